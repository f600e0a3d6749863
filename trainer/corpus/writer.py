"""Write a corpus folder: rows as they come, the manifest at the end; format.py describes the format."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.corpus.format import (
    FORMAT_VERSION,
    CorpusCounts,
    Manifest,
    SourceRecord,
    tokenizer_hash,
)
from distilspeed.trainer.corpus.packing import PackedRows, RowRules
from distilspeed.trainer.corpus.pool import PackedBatch
from distilspeed.trainer.corpus.shard import Shard
from distilspeed.trainer.corpus.vocabulary import objective_of, structure_ids
from distilspeed.trainer.files import FileRecord

VERSIONED_PACKAGES = ("distilspeed", "datasets", "pyarrow", "tokenizers", "transformers", "numpy")
ARROW_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True)
class WriterState:
    """The progress of a :class:`RowWriter`: sizes of both ``data.arrow`` files, and counts of their content."""

    train_bytes: int
    held_out_bytes: int
    counts: CorpusCounts
    token_counts: tuple[int, ...]


def row_rules(tokenizer: PreTrainedTokenizerFast, seq_length: int) -> RowRules:
    objective, end, unknown = objective_of(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token_id
    is_causal = objective == "causal"
    return RowRules(
        seq_length=seq_length,
        pad_id=end if is_causal else tokenizer.pad_token_id,
        cls_id=end if is_causal else tokenizer.cls_token_id,
        sep_id=end if is_causal else tokenizer.sep_token_id,
        unk_id=end if unknown is None else unknown,
        special_ids=structure_ids(tokenizer),
        dtype="uint16" if len(tokenizer) <= 1 << 16 else "int32",
        objective=objective,
    )


def is_held_out(row: int, fraction: float) -> bool:
    """Return whether a row is held out: row 0, and each row at which ``row * fraction`` passes a whole number.

    Held-out rows are evenly spread, so every source has its share. They depend only on the row number. The pieces of a
    document longer than a row may be in both splits.
    """
    return math.floor(row * fraction) != math.floor((row - 1) * fraction)


def installed_versions() -> dict[str, str]:
    return {package: version(package) for package in VERSIONED_PACKAGES}


class RowWriter:
    """Writes and counts the rows of both splits; continues from ``state`` if given."""

    def __init__(
        self,
        folder: Path,
        rules: RowRules,
        vocab_size: int,
        held_out_fraction: float,
        state: WriterState | None = None,
    ) -> None:
        self._held_out_fraction = held_out_fraction
        self._pad_id = rules.pad_id
        self._counts = Counter(asdict(state.counts) if state else {})
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)
        if state:
            self.token_counts += np.array(state.token_counts)
        self._train = SplitWriter(folder / "train", rules, state.train_bytes if state else 0)
        self._held_out = SplitWriter(folder / "held_out", rules, state.held_out_bytes if state else 0)

    @property
    def counts(self) -> CorpusCounts:
        return CorpusCounts(**self._counts)

    def add(self, batch: PackedBatch) -> None:
        rows = batch.rows
        written = self._counts["train_rows"] + self._counts["held_out_rows"]
        held_out_rows = np.array(
            [is_held_out(written + row, self._held_out_fraction) for row in range(len(rows.input_ids))],
            dtype=bool,
        )
        train, held_out = rows.select(~held_out_rows), rows.select(held_out_rows)
        self._train.write_rows(train)
        self._held_out.write_rows(held_out)
        self.token_counts += np.bincount(train.input_ids.ravel(), minlength=len(self.token_counts))
        padding = train.input_ids.size - int(train.real_tokens.sum())
        self.token_counts[self._pad_id] -= padding
        self._counts.update(
            documents=batch.documents,
            dropped_null=batch.dropped_null,
            dropped_blank=batch.dropped_blank,
            pieces=len(rows.piece_lengths),
            dropped_short=batch.dropped_short,
            dropped_unknown=batch.dropped_unknown,
            train_rows=len(train.input_ids),
            train_tokens=int(train.real_tokens.sum()),
            held_out_rows=len(held_out.input_ids),
            held_out_tokens=int(held_out.real_tokens.sum()),
        )

    def state(self) -> WriterState:
        """Return the state that another writer can continue from, once the files are synced to disk."""
        return WriterState(
            train_bytes=self._train.flush(),
            held_out_bytes=self._held_out.flush(),
            counts=self.counts,
            token_counts=tuple(self.token_counts.tolist()),
        )

    def close(self) -> None:
        self._train.close()
        self._held_out.close()


class SplitWriter:
    """Writes a folder for ``datasets.load_from_disk``, as one Arrow stream.

    ``keep_bytes``: bytes of an existing ``data.arrow`` to continue after; 0 starts a new file. The class writes
    serialised messages itself, because pyarrow's stream writer cannot append to a stream.
    """

    def __init__(self, folder: Path, rules: RowRules, keep_bytes: int = 0) -> None:
        features = datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value(rules.dtype), length=rules.seq_length),
                "document_lengths": datasets.List(datasets.Value("int32")),
                "real_tokens": datasets.Value("int32"),
                "maskable_tokens": datasets.Value("int32"),
            }
        )
        folder.mkdir(exist_ok=True)
        datasets.DatasetInfo(features=features).write_to_directory(str(folder))
        # As Dataset.save_to_disk writes it; that call would need the whole dataset and write every row again.
        state: dict[str, object] = {
            "_data_files": [{"filename": "data.arrow"}],
            "_fingerprint": folder.name,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        self._schema = features.arrow_schema
        self._file: BinaryIO = (folder / "data.arrow").open("r+b" if keep_bytes else "wb")
        if keep_bytes:
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)
        else:
            self._file.write(self._schema.serialize())

    def write_rows(self, rows: PackedRows) -> None:
        if len(rows.input_ids):
            offsets = np.concatenate([[0], np.cumsum(rows.pieces_per_row)]).astype(np.int32)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(rows.input_ids.ravel()), rows.input_ids.shape[1]),
                pa.ListArray.from_arrays(offsets, rows.piece_lengths),
                pa.array(rows.real_tokens),
                pa.array(rows.maskable_tokens),
            ]
            self.write(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def write(self, batch: pa.RecordBatch) -> None:
        self._file.write(batch.serialize())

    def flush(self) -> int:
        """Flush to the operating system, and return the size of the file in bytes."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        self._file.write(ARROW_END_OF_STREAM)
        self._file.close()


def finish_corpus(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    seq_length: int,
    sources: tuple[SourceRecord, ...],
    document_separator: str,
    shard: Shard,
    counts: CorpusCounts,
    token_counts: np.ndarray,
) -> None:
    """Complete a folder that has both splits: add token counts, the tokenizer and the manifest."""
    np.save(folder / "token_counts.npy", token_counts)
    tokenizer.save_pretrained(folder / "tokenizer")
    places = (counts.train_rows + counts.held_out_rows) * seq_length
    rules = row_rules(tokenizer, seq_length)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=len(tokenizer),
        seq_length=seq_length,
        pad_id=rules.pad_id,
        cls_id=rules.cls_id,
        sep_id=rules.sep_id,
        mask_id=tokenizer.mask_token_id,
        unk_id=rules.unk_id,
        special_ids=rules.special_ids,
        counts=counts,
        padding_fraction=1 - (counts.train_tokens + counts.held_out_tokens) / places,
        sources=sources,
        document_separator=document_separator,
        shard=shard,
        objective=rules.objective,
        versions=installed_versions(),
        files=tuple(FileRecord.of(folder, path) for path in _corpus_files(folder)),
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def _corpus_files(folder: Path) -> list[Path]:
    parts = (folder / "train", folder / "held_out", folder / "tokenizer")
    return sorted([folder / "token_counts.npy", *(file for part in parts for file in part.rglob("*"))])
