"""A corpus on disk: text to packed rows of token ids, memory-mapped, with a manifest that vouches for them.

train/, held_out/   `datasets.Dataset` folders (Arrow). A row: input_ids [seq_length] uint16 or int32,
                    whole pieces ``[CLS] … [SEP]`` one after the other, then padding;
                    document_lengths, int32, the tokens of each piece; real_tokens, their sum;
                    maskable_tokens, how many are not special (``special_ids`` of the manifest)
token_counts.npy    int64 [vocabulary], how often each token occurs in train, padding not counted
tokenizer/          the tokenizer, as ``save_pretrained`` leaves it
manifest.json       :class:`Manifest`
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.corpus.vocabulary import check_case
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.files import FileRecord, from_json

FORMAT_VERSION = 1
SPECIAL_TOKENS = ("pad", "cls", "sep", "mask", "unk")


@dataclass(frozen=True)
class SourceRecord:
    """One source as the manifest names it: no folders of the machine; ``bytes`` is None for the hub."""

    name: str
    bytes: int | None


@dataclass(frozen=True)
class CorpusCounts:
    """How much was read and what became of it; tokens include ``[CLS]`` and ``[SEP]``, never padding.

    ``documents``: those with text. ``dropped_null`` and ``dropped_blank`` are documents without (0 in corpora from
    before they were counted), ``dropped_short`` and ``dropped_unknown`` pieces.
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
    """What a corpus says of itself.

    ``vocab_size`` is the tokenizer's length, added tokens included. ``special_ids`` are never masked; the unknown
    token is one of them, an added token that stands for content ("<url>") is not.
    """

    format_version: int
    tokenizer_hash: str
    vocab_size: int
    seq_length: int
    pad_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    unk_id: int
    special_ids: tuple[int, ...]
    counts: CorpusCounts
    padding_fraction: float
    sources: tuple[SourceRecord, ...]
    versions: dict[str, str]
    files: tuple[FileRecord, ...]
    # What the first corpora of this format do not say:
    shard: Shard = WHOLE
    document_separator: str = "line"

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
    """``input_ids``: [rows, seq_length] int64, padding behind. ``document_lengths``: one int64 array a row."""

    input_ids: np.ndarray
    document_lengths: list[np.ndarray]


def open_corpus(data_dir: Path, verify_checksums: bool = False) -> Corpus:
    """Open a prepared corpus, memory-mapped.

    Every file's presence and size is checked, and with ``verify_checksums`` its content: token ids and tokenizer, too.
    ``UserError`` for a folder that is no corpus, one of another format, and one with a missing or damaged file.
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
    except Exception as error:  # whatever a damaged file leads datasets, pyarrow and numpy to
        raise UserError("damaged-corpus", _damaged(data_dir, first_line(error))) from error
    if verify_checksums:
        corpus.load_tokenizer()
    return corpus


def read_rows(dataset: datasets.Dataset, indices: Sequence[int] | np.ndarray) -> RowBatch:
    """Fetch rows (at least one) of a split by index, in the order asked for; ``IndexError`` out of range."""
    table = dataset.with_format("arrow")[[int(index) for index in indices]]
    input_ids = table.column("input_ids").combine_chunks()
    lengths = table.column("document_lengths").combine_chunks()
    ends = np.cumsum(lengths.value_lengths().to_numpy())
    return RowBatch(
        input_ids=input_ids.flatten().to_numpy().reshape(len(input_ids), -1).astype(np.int64),
        document_lengths=np.split(lengths.flatten().to_numpy().astype(np.int64), ends[:-1]),
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub; ``UserError`` for one that masking cannot use or with a wrong case."""
    try:
        # False, because unless told transformers asks at the terminal whether to run a repository's code.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub's, the file system's, and bare ones out of the tokenizers library
        raise UserError(
            "unusable-tokenizer",
            f"the tokenizer {name} cannot be loaded: {first_line(error)}; "
            "check the folder, or the name and the connection to the hub",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            "unusable-tokenizer",
            f"{name} has no fast tokenizer; convert it (tokenizer.json) or choose another",
        )
    missing = [kind for kind in SPECIAL_TOKENS if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise UserError(
            "unusable-tokenizer",
            f"the tokenizer {name} has no {', '.join(missing)} token; add it or choose another tokenizer",
        )
    # transformers makes a tokenizer of special tokens alone where the file with the vocabulary is missing.
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
    check_case(name, tokenizer)
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what a tokenizer does to text, in hexadecimal.

    Truncation and padding are left out: they are switches of a call, and a tokenizer that was used with
    them is still the same one.
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
            f"{data_dir} is not a prepared corpus (it has no manifest.json); "
            "make one with launch/prepare_data.py",
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            "damaged-corpus", _damaged(data_dir, f"manifest.json cannot be read: {first_line(error)}")
        ) from error
    raise UserError(
        "unsupported-format",
        f"{data_dir} has corpus format {found} and this version reads {FORMAT_VERSION}; "
        "prepare it again with launch/prepare_data.py",
    )


def _check_agreement(corpus: Corpus, token_ids: bool) -> None:
    """Raise ``ValueError`` unless the files hold what the manifest says; reads all rows where ``token_ids``."""
    manifest = corpus.manifest
    length, vocab_size = manifest.seq_length, manifest.vocab_size
    ids = {manifest.pad_id, manifest.cls_id, manifest.sep_id, manifest.mask_id, manifest.unk_id}
    if length < 1 or not all(0 <= token < vocab_size for token in ids | set(manifest.special_ids)):
        raise ValueError("manifest.json names special tokens beyond the vocabulary, or rows of no length")
    counts = corpus.token_counts
    if counts.shape != (vocab_size,) or counts.dtype != np.int64 or counts.min() < 0:
        raise ValueError(f"token_counts.npy does not count a vocabulary of {vocab_size} tokens")
    said = {"train": manifest.counts.train_rows, "held_out": manifest.counts.held_out_rows}
    for name, split in (("train", corpus.train), ("held_out", corpus.held_out)):
        if len(split) != said[name]:
            raise ValueError(f"{name} has {len(split)} rows instead of {said[name]}")
        table = split.data
        column = table.column("input_ids")
        if column.type.list_size != length:
            raise ValueError(f"the rows of {name} have {column.type.list_size} tokens instead of {length}")
        most = pc.max(table.column("real_tokens")).as_py() or 0
        if most > length:
            raise ValueError(f"{name} has a row with {most} tokens of {length}")
        if token_ids:
            highest = max((pc.max(chunk.flatten()).as_py() or 0 for chunk in column.chunks), default=0)
            if highest >= vocab_size:
                raise ValueError(f"{name} has token id {highest} in a vocabulary of {vocab_size}")


def _load_split(folder: Path) -> datasets.Dataset:
    return datasets.Dataset.load_from_disk(str(folder), keep_in_memory=False)


def _damaged(data_dir: Path, what: str) -> str:
    return f"the corpus {data_dir} is damaged: {what}; prepare it again with launch/prepare_data.py"
