"""The corpus format on disk: packed rows of token ids, memory-mapped, and a manifest with their checksums.

train/, held_out/   `datasets.Dataset` folders (Arrow). Columns of a row:
                    input_ids [seq_length] uint16 or int32: whole pieces (packing.py), then padding;
                    document_lengths, int32: the tokens of each piece; real_tokens: their sum;
                    maskable_tokens: the number of tokens that are not in the manifest's ``special_ids``
token_counts.npy    int64 [vocabulary]: how often each token occurs in train, without padding
tokenizer/          the tokenizer, as ``save_pretrained`` writes it
manifest.json       :class:`Manifest`
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.corpus.vocabulary import check_case, objective_of
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.files import FileRecord, from_json

FORMAT_VERSION = 1
SPECIAL_TOKENS = ("pad", "cls", "sep", "mask", "unk")


@dataclass(frozen=True)
class SourceRecord:
    """A source in the manifest: ``name`` has no parent folders; ``bytes`` is None for a hub dataset."""

    name: str
    bytes: int | None


@dataclass(frozen=True)
class CorpusCounts:
    """Counts of documents, pieces, rows and tokens; tokens include ``[CLS]``, ``[SEP]`` and ``<|endoftext|>``.

    ``documents`` have text. ``dropped_null`` and ``dropped_blank`` count documents without text, ``dropped_short`` and
    ``dropped_unknown`` pieces.
    """

    documents: int = 0
    dropped_null: int = 0
    dropped_blank: int = 0
    pieces: int = 0
    dropped_short: int = 0
    dropped_unknown: int = 0
    train_rows: int = 0
    train_tokens: int = 0
    held_out_rows: int = 0
    held_out_tokens: int = 0

    @property
    def documents_read(self) -> int:
        return self.documents + self.dropped_null + self.dropped_blank


@dataclass(frozen=True)
class Manifest:
    """The metadata of a corpus.

    ``vocab_size`` is the tokenizer's length, added tokens included. ``special_ids`` are never masked. They include the
    unknown token, but not added tokens that stand for content ("<url>"). In a causal corpus ``cls_id``, ``sep_id`` and
    ``pad_id`` are the end-of-text token, and there is no ``mask_id``.
    """

    format_version: int
    tokenizer_hash: str
    vocab_size: int
    seq_length: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int | None
    unk_id: int
    special_ids: tuple[int, ...]
    counts: CorpusCounts
    padding_fraction: float
    sources: tuple[SourceRecord, ...]
    versions: dict[str, str]
    files: tuple[FileRecord, ...]
    # The first corpora of this format do not have these fields.
    shard: Shard = WHOLE
    document_separator: str = "line"
    objective: TrainingObjective = "masked"

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; ``token_counts``: [vocab_size] int64 over ``train``."""

    path: Path
    manifest: Manifest
    train: datasets.Dataset
    held_out: datasets.Dataset
    token_counts: np.ndarray

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(str(self.path / "tokenizer"))


@dataclass(frozen=True)
class RowBatch:
    """``input_ids``: [rows, seq_length] int64, padded at the end. ``document_lengths``: one int64 array per row."""

    input_ids: np.ndarray
    document_lengths: list[np.ndarray]


def open_corpus(data_dir: Path, verify_checksums: bool = False) -> Corpus:
    """Open a prepared corpus, memory-mapped.

    Checks that every file exists and has its size. ``verify_checksums`` also checks content, token ids and tokenizer.
    Raises ``UserError`` if the folder is not a corpus, has another format version, or has a missing or damaged file.
    """
    manifest = _read_manifest(data_dir)
    try:
        for record in manifest.files:
            if damage := record.damage(data_dir, content=verify_checksums):
                raise UserError("damaged-corpus", _damaged(data_dir, damage))
        corpus = Corpus(
            path=data_dir,
            manifest=manifest,
            train=_load_split(data_dir / "train"),
            held_out=_load_split(data_dir / "held_out"),
            token_counts=np.load(data_dir / "token_counts.npy"),
        )
        _check_agreement(corpus, token_ids=verify_checksums)
    except UserError:
        raise
    except Exception as error:  # datasets, pyarrow and numpy raise many types for a damaged file
        raise UserError("damaged-corpus", _damaged(data_dir, first_line(error))) from error
    if verify_checksums:
        corpus.load_tokenizer()
    return corpus


def read_rows(dataset: datasets.Dataset, indices: Sequence[int] | np.ndarray) -> RowBatch:
    """Read one or more rows of a split by index, in the given order; raise ``IndexError`` if out of range."""
    # Not dataset.with_format("arrow"), which copies the dataset and takes longer than reading.
    table = dataset.data.fast_gather(indices)
    input_ids = table.column("input_ids").combine_chunks()
    of_rows = table.column("document_lengths").combine_chunks()
    lengths, ends = of_rows.flatten().to_numpy().astype(np.int64), of_rows.value_lengths().to_numpy().cumsum()
    return RowBatch(
        input_ids=input_ids.flatten().to_numpy().reshape(len(input_ids), -1).astype(np.int64),
        document_lengths=[lengths[start:end] for start, end in pairwise([0, *ends])],
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder or the hub.

    Raises ``UserError`` if it cannot be loaded, can be used neither for masking nor for a causal corpus, or lower-cases
    text for a cased vocabulary.
    """
    try:
        # The default makes transformers ask at the terminal whether to run the repository's code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # from the hub, the file system, or a bare Exception of tokenizers
        raise UserError(
            "unusable-tokenizer",
            f"cannot load the tokenizer {name}: {first_line(error)}; "
            "check the folder, or the hub id and the connection",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            "unusable-tokenizer",
            f"{name} has no fast tokenizer; convert it (tokenizer.json) or choose another",
        )
    missing = [kind for kind in SPECIAL_TOKENS if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing and objective_of(tokenizer) == "masked":
        raise UserError(
            "unusable-tokenizer",
            f"the tokenizer {name} has no {', '.join(missing)} token; add it or choose another tokenizer",
        )
    # Without a vocabulary file, transformers makes a tokenizer that has only special tokens.
    if tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).keys() <= set(
        tokenizer.all_special_tokens
    ):
        raise UserError(
            "unusable-tokenizer",
            f"the tokenizer {name} has no vocabulary; add its tokenizer.json or vocab.txt",
        )
    if max(tokenizer.get_vocab().values()) >= len(tokenizer):
        raise UserError(
            "unusable-tokenizer", f"the ids of the tokenizer {name} have gaps; choose another tokenizer"
        )
    around_text = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    if objective_of(tokenizer) == "masked" and tokenizer("")["input_ids"] != around_text:
        raise UserError(
            "unusable-tokenizer",
            f"the tokenizer {name} does not put {tokenizer.cls_token} and {tokenizer.sep_token} around a text, as the "
            "corpus does; set its post-processor, or its cls_token and sep_token",
        )
    check_case(name, tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of a tokenizer's pipeline, in hexadecimal.

    The hash leaves out truncation and padding: a call sets them, and they do not change the token ids of a text.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(pipeline, sort_keys=True).encode()).hexdigest()


def _read_manifest(data_dir: Path) -> Manifest:
    try:
        text = (data_dir / "manifest.json").read_text(encoding="utf-8")
        found = json.loads(text).get("format_version")
        if found == FORMAT_VERSION:
            return from_json(Manifest, text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            "not-a-corpus",
            f"{data_dir} is not a prepared corpus (no manifest.json); "
            "prepare one with launch/prepare_data.py",
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            "damaged-corpus", _damaged(data_dir, f"cannot read manifest.json: {first_line(error)}")
        ) from error
    raise UserError(
        "unsupported-format",
        f"{data_dir} has corpus format {found!r}, and this version reads {FORMAT_VERSION}; "
        "prepare it again with launch/prepare_data.py",
    )


def _check_agreement(corpus: Corpus, token_ids: bool) -> None:
    """Raise ``ValueError`` unless the files match the manifest; reads all rows if ``token_ids`` is true."""
    manifest = corpus.manifest
    length, vocab_size = manifest.seq_length, manifest.vocab_size
    ids = {manifest.pad_id, manifest.cls_id, manifest.sep_id, manifest.unk_id}
    ids |= set() if manifest.mask_id is None else {manifest.mask_id}
    if (manifest.mask_id is None) != (manifest.objective == "causal"):
        raise ValueError("manifest.json has a mask_id in a causal corpus, or none in a masked one")
    if length < 1 or not all(0 <= token < vocab_size for token in ids | set(manifest.special_ids)):
        raise ValueError(
            "manifest.json has special token ids outside the vocabulary, or a seq_length below 1"
        )
    counts = corpus.token_counts
    if counts.shape != (vocab_size,) or counts.dtype != np.int64 or counts.min() < 0:
        raise ValueError(f"token_counts.npy has no valid counts for a vocabulary of {vocab_size} tokens")
    expected = {"train": manifest.counts.train_rows, "held_out": manifest.counts.held_out_rows}
    for name, split in (("train", corpus.train), ("held_out", corpus.held_out)):
        if len(split) != expected[name]:
            raise ValueError(f"{name} has {len(split)} rows instead of {expected[name]}")
        table = split.data
        column = table.column("input_ids")
        if column.type.list_size != length:
            raise ValueError(f"the rows of {name} have {column.type.list_size} tokens instead of {length}")
        most = pc.max(table.column("real_tokens")).as_py() or 0
        if most > length:
            raise ValueError(f"{name} has a row with {most} real tokens, and rows have {length} tokens")
        if token_ids:
            highest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in column.chunks), default=0)
            if highest >= vocab_size:
                raise ValueError(f"{name} has token id {highest} in a vocabulary of {vocab_size}")


def _load_split(folder: Path) -> datasets.Dataset:
    return datasets.Dataset.load_from_disk(str(folder), keep_in_memory=False)


def _damaged(data_dir: Path, reason: str) -> str:
    return f"the corpus {data_dir} is damaged: {reason}; prepare it again with launch/prepare_data.py"
