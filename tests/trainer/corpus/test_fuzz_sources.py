"""Any bytes of a text file give documents or one error, and valid text is read completely."""

import bz2
import gzip
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distilspeed.trainer.corpus.arguments import Separator
from distilspeed.trainer.corpus.packing import MINIMUM_PIECE_TOKENS, UNKNOWN_SHARE_LIMIT, RowRules
from distilspeed.trainer.corpus.pool import pack_batch
from distilspeed.trainer.corpus.shard import Shard
from distilspeed.trainer.corpus.sources import file_source
from distilspeed.trainer.corpus.tokenization import DocumentTokenizer
from distilspeed.trainer.errors import UserError

fuzz = settings(derandomize=True, max_examples=300)
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

# Text with line ends and white space of all kinds, and with syntax of the supported formats.
characters = st.text(
    st.sampled_from('aé中\U0001f600 \t\r\n\v\f\x1c\x85\u2028\ufeff[]{}",:\\')
    | st.characters(exclude_characters="\0", codec="utf-8")
)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["text", "b"]), values),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few replaced by others."""
    content = draw(whole)
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 4)))
    return content[:start] + draw(st.binary(max_size=4)) + content[end:]


def parquet_bytes(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def documents_of(path: Path, count: int, separator: Separator = "line") -> list[str]:
    """Return the documents of all shards, one shard after the other."""
    shards = (file_source(path, "text", Shard(index, count), separator) for index in range(count))
    return [document for shard in shards for document in shard.documents()]


@fuzz
@given(
    suffix=st.sampled_from(SUFFIXES),
    compress=st.sampled_from([bytes, gzip.compress, bz2.compress, lzma.compress, zstd]),
    content=st.binary()
    | characters.map(str.encode)
    | damaged(characters.map(str.encode))
    | damaged(json_values.map(json.dumps).map(str.encode))
    | damaged(
        st.lists(st.text(), max_size=5).map(lambda texts: json.dumps([{"text": t} for t in texts]).encode())
    )
    | damaged(st.lists(characters, max_size=5).map(parquet_bytes)),
    count=st.integers(1, 3),
    separator=st.sampled_from(["line", "blank_line"]),
    damage=st.integers(0, 1 << 16),
)
@example(".json", bytes, b"[" * 100_000, 1, "line", 0)
@example(".jsonl", bytes, b'{"text": ' + b"1" * 5000 + b"}", 1, "line", 0)
@example(".json", bytes, b'[{"text": "a"},\n{"text": "\xff"}]', 2, "line", 0)
@example(".txt", bytes, b"a\n\xff\n", 2, "line", 0)
def test_any_bytes_give_documents_or_one_error(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    compress: Callable[[bytes], bytes],
    content: bytes,
    count: int,
    separator: Separator,
    damage: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    packed = compress(content)
    if compress is not bytes and damage < len(packed):
        packed = packed[:damage] + bytes([packed[damage] ^ 1]) + packed[damage + 1 :]
    path.write_bytes(packed)
    try:
        documents = documents_of(path, count, separator)
    except UserError:
        return
    for document in documents:
        assert not document.isspace()
        document.encode()  # fails for half of a surrogate pair, which tokenizers reject


# Not JSON and not markup: text that begins like JSON is read as records, and markup is refused.
prose = characters.filter(lambda text: not re.match(r"[\s\ufeff]*[\[{<]", text))


@fuzz
@given(text=prose, mark=st.sampled_from(["", "\ufeff"]), count=st.integers(1, 5))
@example(text="a", mark="", count=3)
def test_every_line_of_a_text_that_is_not_blank_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, text: str, mark: str, count: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "valid.txt"
    path.write_bytes((mark + text).encode())
    if path.stat().st_size == 0:
        return
    lines = re.split("\r\n|\r|\n", (mark + text).removeprefix("\ufeff"))
    assert documents_of(path, count) == [line for line in lines if line and not line.isspace()]


@fuzz
@given(
    text=st.lists(
        st.sampled_from(["a", "é", "\n", "\n\n", "\n \n", "\r\n", "\u3000", "\r"]), max_size=30
    ).map("".join),
    mark=st.sampled_from(["", "\ufeff"]),
    count=st.integers(1, 5),
    compress=st.sampled_from([bytes, gzip.compress]),
)
def test_the_lines_between_blank_ones_are_one_document_in_one_shard(
    tmp_path_factory: pytest.TempPathFactory,
    text: str,
    mark: str,
    count: int,
    compress: Callable[[bytes], bytes],
) -> None:
    path = tmp_path_factory.getbasetemp() / "sentences"
    path.write_bytes(compress((mark + text).encode()))
    if not mark + text:
        return
    lines = re.split("\r\n|\r|\n", text)
    grouped = groupby(lines, key=lambda line: bool(line.strip()))
    assert documents_of(path, count, "blank_line") == [
        "\n".join(group) for is_text, group in grouped if is_text
    ]


@fuzz
@given(
    texts=st.lists(st.text(min_size=1), min_size=1, max_size=8),
    suffix=st.sampled_from(SUFFIXES[1:]),
    count=st.integers(1, 4),
    ascii_only=st.booleans(),
)
def test_every_text_of_a_file_of_records_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str, count: int, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"records{suffix}"
    if suffix == ".parquet":
        path.write_bytes(parquet_bytes(texts))
    else:
        records = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
        content = "\n".join(records) if suffix == ".jsonl" else f"[{','.join(records)}]"
        path.write_text(content, encoding="utf-8")
    assert documents_of(path, count) == [text for text in texts if not text.isspace()]


@fuzz
@given(
    documents=st.lists(
        st.text(st.sampled_from("ab list function 1.é中\u16a0") | st.characters(codec="utf-8"), max_size=300)
        | st.none(),
        max_size=6,
    ),
    seq_length=st.integers(16, 40),
)
def test_packed_rows_contain_every_piece_of_any_documents_once(
    small_tokenizer_dir: Path, documents: list[str | None], seq_length: int
) -> None:
    tokenizer = Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))
    pad, unk, cls, sep, mask = (
        tokenizer.token_to_id(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP", "MASK")
    )
    rules = RowRules(seq_length, pad, cls, sep, unk, (pad, unk, cls, sep, mask), "uint16")
    packed = pack_batch(documents, DocumentTokenizer(tokenizer.to_str()), rules)

    tokenizer.encode_special_tokens = True
    kept: Counter[tuple[int, ...]] = Counter()
    dropped = 0
    for document in documents:
        ids = tokenizer.encode(document or "", add_special_tokens=False).ids
        for start in range(0, len(ids), seq_length - 2):
            piece = (cls, *ids[start : start + seq_length - 2], sep)
            is_kept = len(piece) >= MINIMUM_PIECE_TOKENS and piece.count(unk) < UNKNOWN_SHARE_LIMIT * len(
                piece
            )
            kept.update([piece] * is_kept)
            dropped += not is_kept
    rows = packed.rows
    lengths = iter(rows.piece_lengths)
    found: Counter[tuple[int, ...]] = Counter()
    for row, count in zip(rows.input_ids, rows.pieces_per_row, strict=True):
        *pieces, padding = np.split(row, np.cumsum(list(islice(lengths, count))))
        assert (padding == pad).all()
        found.update(tuple(piece.tolist()) for piece in pieces)
    assert found == kept
    assert packed.dropped_short + packed.dropped_unknown == dropped
    assert packed.dropped_null == documents.count(None)
    assert packed.dropped_blank == sum(
        document is not None and not document.strip() for document in documents
    )
    assert packed.documents == len(documents) - packed.dropped_null - packed.dropped_blank
