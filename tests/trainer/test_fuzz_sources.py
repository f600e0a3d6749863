"""Whatever the bytes of a text file: its documents or one line of error, and of valid text every character."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distilspeed.trainer.corpus import Shard
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.packing import MINIMUM_PIECE_TOKENS, UNKNOWN_SHARE_LIMIT, RowRules
from distilspeed.trainer.sources import file_source
from distilspeed.trainer.tokenization import DocumentTokenizer
from distilspeed.trainer.workers import pack_batch

fuzz = settings(derandomize=True, deadline=None, max_examples=300)
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

# Text as it is, with line ends and white space of all kinds, and pieces of the formats that are read.
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
    """Bytes of which a few are cut out, and others put in their place."""
    content = draw(whole)
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 4)))
    return content[:start] + draw(st.binary(max_size=4)) + content[end:]


def parquet_bytes(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


def documents_of(path: Path, count: int) -> list[str]:
    """Of all shards, one after the other."""
    shards = (file_source(path, "text", Shard(index, count)) for index in range(count))
    return [document for shard in shards for document in shard.documents()]


@fuzz
@given(
    suffix=st.sampled_from(SUFFIXES),
    content=st.binary()
    | characters.map(str.encode)
    | damaged(characters.map(str.encode))
    | damaged(json_values.map(json.dumps).map(str.encode))
    | damaged(
        st.lists(st.text(), max_size=5).map(lambda texts: json.dumps([{"text": t} for t in texts]).encode())
    )
    | damaged(st.lists(characters, max_size=5).map(parquet_bytes)),
    count=st.integers(1, 3),
)
@example(suffix=".json", content=b"[" * 100_000, count=1)
@example(suffix=".jsonl", content=b'{"text": ' + b"1" * 5000 + b"}", count=1)
@example(suffix=".json", content=b'[{"text": "a"},\n{"text": "\xff"}]', count=2)
@example(suffix=".txt", content=b"a\n\xff\n", count=2)
def test_any_bytes_are_documents_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, count: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        documents = documents_of(path, count)
    except UserError:
        return
    for document in documents:
        assert not document.isspace()
        document.encode()  # what tokenizers need: no half of a surrogate pair


@fuzz
@given(text=characters, mark=st.sampled_from(["", "\ufeff"]), count=st.integers(1, 5))
@example(text="a", mark="", count=3)
def test_of_a_text_every_line_that_is_not_blank_comes_out_once(
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
    texts=st.lists(st.text(min_size=1), min_size=1, max_size=8),
    suffix=st.sampled_from(SUFFIXES[1:]),
    count=st.integers(1, 4),
    ascii_only=st.booleans(),
)
def test_of_records_every_text_comes_out_once(
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
        st.text(st.sampled_from("ab list function 1.é中\u16a0") | st.characters(codec="utf-8"), max_size=300),
        max_size=6,
    ),
    seq_length=st.integers(16, 40),
)
def test_packed_rows_hold_every_piece_of_any_documents_once(
    small_tokenizer_dir: Path, documents: list[str], seq_length: int
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
        ids = tokenizer.encode(document, add_special_tokens=False).ids
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
    assert packed.documents == len(documents)
