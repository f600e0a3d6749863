"""Text to a corpus on disk (its format: corpus.py): written beside, renamed when complete."""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.corpus import (
    FORMAT_VERSION,
    Corpus,
    CorpusCounts,
    FileRecord,
    Manifest,
    load_tokenizer,
    open_corpus,
    tokenizer_hash,
)
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, folder_written_whole
from distilspeed.trainer.packing import (
    PACKING_BUFFER_PIECES,
    PackedRows,
    PieceBatch,
    PieceRules,
    lay_out_rows,
    pack_best_fit_decreasing,
    tokenize_documents,
)
from distilspeed.trainer.sources import Source, dataset_source, file_source

MINIMUM_SEQ_LENGTH = 16
VERSIONED_PACKAGES = ("distilspeed", "datasets", "pyarrow", "tokenizers", "transformers", "numpy")


def _available_cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class CorpusArguments:
    """What to prepare: documents of ``text`` files, then of ``dataset`` specifications, in that order.

    ``dataset``: ``NAME[:CONFIG[:SPLIT]]``, a name on the hub or a local folder.
    ``held_out_fraction``: share of the rows set apart in ``held_out``.
    """

    tokenizer: str
    output_dir: Path
    text: tuple[Path, ...] = ()
    dataset: tuple[str, ...] = ()
    seq_length: int = 512
    text_column: str = "text"
    held_out_fraction: float = 0.01
    num_proc: int = field(default_factory=_available_cores)


def prepare_corpus(arguments: CorpusArguments) -> Corpus:
    """Make the corpus that ``arguments`` describe and open it.

    It is written beside ``output_dir`` and renamed to it when complete, so a folder of that name is never
    partial; nothing stays behind on failure. The same arguments give the same bytes whatever ``num_proc``.
    ``UserError`` for anything the caller can put right.
    """
    _check_arguments(arguments)
    sources = [file_source(path, arguments.text_column) for path in arguments.text]
    sources += [dataset_source(name, arguments.text_column) for name in arguments.dataset]
    tokenizer = load_tokenizer(arguments.tokenizer)
    _check_seq_length(arguments.seq_length, tokenizer)
    for source in sources:
        with contextlib.closing(source.documents()) as documents:
            if next(documents, None) is None:
                raise UserError(f"{source.record.name} holds no text; leave it out or fill it")
    made_parents = [folder for folder in arguments.output_dir.absolute().parents if not folder.exists()]
    try:
        arguments.output_dir.parent.mkdir(parents=True, exist_ok=True)
        with folder_written_whole(arguments.output_dir) as folder:
            _write_corpus(folder, arguments, sources, tokenizer)
    except BaseException as error:
        for parent in made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {arguments.output_dir}: {error}; check free space and permissions"
            ) from error
        raise
    return open_corpus(arguments.output_dir)


def _check_arguments(arguments: CorpusArguments) -> None:
    if not arguments.text and not arguments.dataset:
        raise UserError("there is no text to prepare; give --text or --dataset")
    if arguments.num_proc < 1:
        raise UserError(f"--num_proc {arguments.num_proc} is below 1; give at least 1")
    if not 0 < arguments.held_out_fraction < 0.5:
        raise UserError(
            f"--held_out_fraction {arguments.held_out_fraction} is not between 0 and 0.5; try 0.01"
        )
    check_unoccupied(arguments.output_dir)


def _check_seq_length(seq_length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    # A tokenizer that knows no limit says 1e30, which is above any length that could be asked for.
    if not MINIMUM_SEQ_LENGTH <= seq_length <= tokenizer.model_max_length:
        raise UserError(
            f"--seq_length {seq_length} is not between {MINIMUM_SEQ_LENGTH} and the tokenizer's limit of "
            f"{tokenizer.model_max_length} tokens; choose one that is"
        )


def _write_corpus(
    folder: Path, arguments: CorpusArguments, sources: list[Source], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(folder / "tokenizer")
    documents = chain.from_iterable(source.documents() for source in sources)
    with contextlib.closing(_RowWriter(folder, arguments, tokenizer)) as writer:
        batches = tokenize_documents(
            documents, tokenizer.backend_tokenizer.to_str(), writer.rules, arguments.num_proc
        )
        with contextlib.closing(batches), tqdm(unit=" documents", disable=None) as progress:
            for batch in batches:
                writer.add(batch)
                progress.set_postfix(rows=writer.rows, refresh=False)
                progress.update(batch.documents)
        writer.write_rows()
    counts = CorpusCounts(**writer.counts)
    if not counts.train_rows or not counts.held_out_rows:
        raise UserError(
            f"the text fills {writer.rows} row(s) of {arguments.seq_length} tokens, "
            "too few for training and held-out rows; give more text or a smaller --seq_length"
        )
    np.save(folder / "token_counts.npy", writer.token_counts)
    manifest = _describe(folder, arguments.seq_length, sources, tokenizer, counts)
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def _describe(
    folder: Path,
    seq_length: int,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    counts: CorpusCounts,
) -> Manifest:
    places = (counts.train_rows + counts.held_out_rows) * seq_length
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_hash=tokenizer_hash(tokenizer),
        vocab_size=len(tokenizer),
        seq_length=seq_length,
        pad_id=tokenizer.pad_token_id,
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        mask_id=tokenizer.mask_token_id,
        unk_id=tokenizer.unk_token_id,
        special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
        counts=counts,
        padding_fraction=1 - (counts.train_tokens + counts.held_out_tokens) / places,
        sources=tuple(source.record for source in sources),
        versions={package: version(package) for package in VERSIONED_PACKAGES},
        files=tuple(_record_file(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()),
    )


def _record_file(folder: Path, path: Path) -> FileRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, digest)


def is_held_out(row: int, fraction: float) -> bool:
    """Whether a row is set apart: row 0, and each row at which ``row * fraction`` passes a whole number.

    Evenly spread, so every source gives its share; a function of the row's number and nothing else. The
    pieces of one document longer than a row may fall on both sides.
    """
    return math.floor(row * fraction) != math.floor((row - 1) * fraction)


class _RowWriter:
    """Packs pieces as they come and writes the rows of both splits; memory is that of one packing buffer."""

    def __init__(self, folder: Path, arguments: CorpusArguments, tokenizer: PreTrainedTokenizerFast) -> None:
        self.rules = PieceRules(
            seq_length=arguments.seq_length,
            cls_id=tokenizer.cls_token_id,
            sep_id=tokenizer.sep_token_id,
            unk_id=tokenizer.unk_token_id,
            dtype="uint16" if len(tokenizer) <= 1 << 16 else "int32",
        )
        self.rows = 0
        self.token_counts = np.zeros(len(tokenizer), dtype=np.int64)
        self.counts: Counter[str] = Counter()
        self._pad_id = tokenizer.pad_token_id
        self._maskable = np.ones(len(tokenizer), dtype=bool)
        self._maskable[tokenizer.all_special_ids] = False
        self._held_out_fraction = arguments.held_out_fraction
        self._pieces: list[np.ndarray] = []
        self._train = _SplitFile(folder / "train", self.rules)
        self._held_out = _SplitFile(folder / "held_out", self.rules)

    def add(self, batch: PieceBatch) -> None:
        self.counts.update(
            documents=batch.documents,
            pieces=len(batch.lengths),
            dropped_short=batch.dropped_short,
            dropped_unknown=batch.dropped_unknown,
        )
        self._pieces += batch.pieces()
        if len(self._pieces) >= PACKING_BUFFER_PIECES:
            self.write_rows()

    def write_rows(self) -> None:
        """Pack and write what has been added since the last time."""
        lengths = [len(piece) for piece in self._pieces]
        train: list[list[np.ndarray]] = []
        held_out: list[list[np.ndarray]] = []
        for row in pack_best_fit_decreasing(lengths, self.rules.seq_length):
            split = held_out if is_held_out(self.rows, self._held_out_fraction) else train
            split.append([self._pieces[piece] for piece in row])
            self.rows += 1
        self._pieces = []
        if train:
            packed = lay_out_rows(train, self.rules.seq_length, self._pad_id)
            is_real = np.arange(self.rules.seq_length) < packed.real_tokens[:, None]
            self.token_counts += np.bincount(packed.input_ids[is_real], minlength=len(self.token_counts))
            self._train.write(packed, self._maskable)
            self.counts.update(train_rows=len(train), train_tokens=int(packed.real_tokens.sum()))
        if held_out:
            packed = lay_out_rows(held_out, self.rules.seq_length, self._pad_id)
            self._held_out.write(packed, self._maskable)
            self.counts.update(held_out_rows=len(held_out), held_out_tokens=int(packed.real_tokens.sum()))

    def close(self) -> None:
        self._train.close()
        self._held_out.close()


class _SplitFile:
    """A folder that ``datasets.load_from_disk`` reads, written as one Arrow stream."""

    def __init__(self, folder: Path, rules: PieceRules) -> None:
        features = datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value(rules.dtype), length=rules.seq_length),
                "document_lengths": datasets.List(datasets.Value("int32")),
                "real_tokens": datasets.Value("int32"),
                "maskable_tokens": datasets.Value("int32"),
            }
        )
        folder.mkdir()
        datasets.DatasetInfo(features=features).write_to_directory(str(folder))
        # What Dataset.save_to_disk writes; it would need the whole dataset, and write every row again.
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
        self._file = (folder / "data.arrow").open("wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def write(self, rows: PackedRows, maskable: np.ndarray) -> None:
        """Write rows as one Arrow batch; ``maskable``: [vocabulary] bool, padding is not."""
        offsets = np.concatenate([[0], np.cumsum(rows.pieces_per_row)]).astype(np.int32)
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(rows.input_ids.ravel()), rows.input_ids.shape[1]),
            pa.ListArray.from_arrays(offsets, rows.piece_lengths),
            pa.array(rows.real_tokens),
            pa.array(maskable[rows.input_ids].sum(axis=1, dtype=np.int32)),
        ]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def close(self) -> None:
        self._stream.close()
        self._file.close()
