"""Documents from every kind of source, whole and in shards."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_errors import raises_user_error

from distilspeed.trainer.corpus.lines import LONGEST_LINE
from distilspeed.trainer.corpus.recognition import READ_BYTES
from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.corpus.sources import dataset_source, file_source
from distilspeed.trainer.errors import UserErrorCode


def json_array(records: datasets.Dataset) -> bytes:
    return json.dumps(list(records)).encode()


def indented_array(records: datasets.Dataset) -> bytes:
    return b"\xef\xbb\xbf" + json.dumps(list(records), indent=2).replace("\n", "\r\n").encode()


def json_lines(records: datasets.Dataset) -> bytes:
    return b"\n".join(json.dumps(record).encode() for record in records)


def spaced_lines(records: datasets.Dataset) -> bytes:
    return b"\xef\xbb\xbf\r\n" + b"\r\n".join(json.dumps(record).encode() for record in records)


def parquet(records: datasets.Dataset) -> bytes:
    file = io.BytesIO()
    records.to_parquet(file)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.output_stream(sink, compression="zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("some.jsonl", json_lines),
        ("some.json", json_lines),
        ("SOME.JSONL", json_lines),
        ("some.ndjson", json_lines),
        ("wiki_00", json_lines),  # WikiExtractor's
        ("some.txt", spaced_lines),
        ("array.json", json_array),
        ("ARRAY.JSON", indented_array),
        ("array.txt", indented_array),
        ("some.parquet", parquet),
        ("SOME.PARQUET", parquet),
        ("part-00000", parquet),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(
    some_text: Path, name: str, write: Callable[[datasets.Dataset], bytes], packed: str
) -> None:
    lines = some_text.read_text(encoding="utf-8").splitlines()
    path = some_text.with_name(name + packed)
    records = datasets.Dataset.from_dict({"id": range(len(lines) + 2), "body": [*lines, None, " \t"]})
    path.write_bytes(COMPRESS[packed](write(records)))
    if write is parquet and packed:
        with raises_user_error("not-utf8" if name == "part-00000" else "not-plain-text", path.name):
            file_source(path, "body")
        return
    source = file_source(path, "body")
    assert list(source.documents()) == lines
    assert list(source.values()) == [*lines, None, " \t"]
    assert (source.record.name, source.record.bytes) == (path.name, path.stat().st_size)


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize("name", ["some.txt", "PG1342", "some.gz"])
def test_a_text_is_read_as_text_under_any_name(some_text: Path, name: str, packed: str) -> None:
    path = some_text.with_name(name + packed)
    path.write_bytes(COMPRESS[packed](some_text.read_bytes()))
    assert list(file_source(path, "ignored").documents()) == some_text.read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    "line",
    [
        "{sic} is what editors write",
        '{"quoted" in braces, it begins}',
        "{} and [] are empty",
        "[Illustration: a title]",
        '["Alice" it is called]',
        "[{braces} in brackets]",
        "PAR1 is a receptor",
        "BZh9 is no word",
        "<quote>",
    ],
)
def test_prose_that_looks_like_another_format_is_read_as_text(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(f"{line}\nthe second line\n")
    assert list(file_source(path, "text").documents()) == [line, "the second line"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('{"text": "a"}\nprose\n', "not-json"),
        ('{"text": "a}\n', "not-json"),
        ('{"text": "a\tb"}\n', "not-json"),
        ('{\n  "text": "a"\n}\n', "not-json"),
        ('{}\n{"text": "a"}\n', "missing-field"),
        ('{"body": "a"}\n', "missing-field"),
        ('[{"text": "a"},\n', "not-json"),
    ],
)
def test_a_file_that_begins_like_json_is_never_read_as_text(
    tmp_path: Path, content: str, code: UserErrorCode
) -> None:
    path = tmp_path / "records.txt"
    path.write_text(content)
    with raises_user_error(code, "records.txt"):
        list(file_source(path, "text").documents())


@pytest.mark.parametrize("folder_name", ["plain", "with:colon", "a:b/c:d"])
@pytest.mark.parametrize("kind", ["data files", "saved dataset", "saved splits"])
def test_every_kind_of_dataset_folder_gives_the_same_documents(
    some_text: Path, tmp_path: Path, folder_name: str, kind: str
) -> None:
    lines = some_text.read_text(encoding="utf-8").splitlines()
    folder = tmp_path / folder_name
    folder.mkdir(parents=True)
    records = datasets.Dataset.from_dict({"text": lines})
    first = records.select(range(10))
    if kind == "data files":
        records.to_json(folder / "train.jsonl")
        first.to_json(folder / "validation.jsonl")
    elif kind == "saved dataset":
        records.save_to_disk(str(folder))
    else:
        datasets.DatasetDict(train=records, validation=first).save_to_disk(str(folder))
    source = dataset_source(str(folder), "text")
    assert list(source.documents()) == lines
    assert source.record.name == folder.name
    if kind != "saved dataset":
        assert list(dataset_source(f"{folder}::validation", "text").documents()) == lines[:10]


def test_a_byte_order_mark_and_line_ends_are_not_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufefffirst line\r\nsecond line\r\n\r\n".encode())
    assert list(file_source(path, "text").documents()) == ["first line", "second line"]


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "scraped.jsonl"
    path.write_text(json.dumps({"text": "an expression \ud83d in a statement"}) + "\n")
    assert list(file_source(path, "text").documents()) == ["an expression ? in a statement"]


@pytest.mark.parametrize("name", ["some.txt", "some.jsonl", "array.json", "some.parquet"])
@pytest.mark.parametrize("becomes", ["gone", "shorter", "another"])
def test_a_file_that_changes_before_it_is_read_gives_one_error(
    tmp_path: Path, name: str, becomes: str
) -> None:
    path = tmp_path / name
    records = datasets.Dataset.from_dict({"text": [f"document {number}" for number in range(50)]})
    write = {".txt": records.to_csv, ".parquet": records.to_parquet}.get(path.suffix, records.to_json)
    write(path)
    source = file_source(path, "text")
    whole = path.read_bytes()
    if becomes == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if becomes == "shorter" else b"\xff" * len(whole))
    is_cut_json = becomes == "shorter" and "json" in path.suffix
    with raises_user_error("not-json" if is_cut_json else "unreadable-file", path.name):
        list(source.documents())


@contextlib.contextmanager
def allocating_less_than(limit: int) -> Iterator[None]:
    """Assert that Python and Arrow each allocate less than ``limit`` bytes at any time."""
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
        assert pa.total_allocated_bytes() - before < limit
    finally:
        tracemalloc.stop()


def test_a_line_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "endless.txt"
    with path.open("wb") as file:
        file.write(b"a line\n" + b"a" * (LONGEST_LINE + 2 * READ_BYTES))
    for shard in (WHOLE, Shard(0, 2)):
        with (
            allocating_less_than(10 * READ_BYTES),
            raises_user_error("line-too-long", "endless.txt", "64", "byte 7"),
        ):
            file_source(path, "text", shard)


def test_a_document_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sentences.txt"
    with path.open("wb") as file:
        file.write(
            b"a short one\n\nthe long one\n"
            + b"a sentence of sixty-four characters, all of them before its end.\n" * (1 << 20)
        )
    with raises_user_error("line-too-long", "64", "'the long one'"):
        file_source(path, "text", separator="blank_line")
    file_source(path, "text")


@pytest.mark.parametrize("place", ["no folder/cache", "no folder/deep/cache", "no folder"])
def test_a_cache_that_cannot_be_written_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "no folder").write_text("but a file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a document"}\n')
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / place))
    with raises_user_error("unwritable-output", f"{tmp_path}/no folder", "HF_HOME"):
        list(dataset_source(str(tmp_path / "data"), "text").documents())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert list(dataset_source(str(tmp_path / "data"), "text").documents()) == ["a document"]
    with raises_user_error("unusable-dataset", str(tmp_path / "missing")):
        list(dataset_source(str(tmp_path / "missing"), "text").documents())


# --- compressed files -----------------------------------------------------------------------------------

CONTENT = b"".join(b"line %d of a file\n" % number for number in range(20_000))


@pytest.mark.parametrize("packed", [*COMPRESS][1:])
def test_a_file_of_several_compressed_parts_is_read_whole(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"parts.txt{packed}"
    path.write_bytes(COMPRESS[packed](CONTENT) + COMPRESS[packed](b"one more"))
    assert list(file_source(path, "text").documents()) == [*CONTENT.decode().splitlines(), "one more"]


@pytest.mark.parametrize("packed", [*COMPRESS][1:])
@pytest.mark.parametrize("shard", [WHOLE, Shard(0, 3)])
def test_a_truncated_compressed_file_is_refused_when_it_is_opened(
    tmp_path: Path, packed: str, shard: Shard
) -> None:
    path = tmp_path / f"cut{packed}"
    whole = COMPRESS[packed](CONTENT)
    for truncated in (whole[:20], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(truncated)
        with raises_user_error("unreadable-file", path.name):
            file_source(path, "text", shard)


@pytest.mark.parametrize("packed", [*COMPRESS][1:])
def test_a_compressed_empty_file_is_refused(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"empty.txt{packed}"
    path.write_bytes(COMPRESS[packed](b""))
    with raises_user_error("no-text", path.name):
        file_source(path, "text")


@pytest.mark.parametrize(
    "packed", [[*COMPRESS][1], *(pytest.param(packed, marks=pytest.mark.full) for packed in [*COMPRESS][2:])]
)
def test_a_compressed_file_is_never_completely_in_memory(tmp_path: Path, packed: str) -> None:
    path = tmp_path / f"large{packed}"
    path.write_bytes(COMPRESS[packed](b"a line of zeros and ones: 0101\n" * (1 << 21)))
    # The 62 MiB of the file are read once, then the first lines again; xz needs a dictionary of 8 MiB.
    with allocating_less_than(20 * READ_BYTES):
        documents = file_source(path, "text").documents()
        for _ in range(1000):
            next(documents)


# --- shards ---------------------------------------------------------------------------------------------


def in_shards(path: Path, count: int) -> list[list[str]]:
    return [list(file_source(path, "text", Shard(index, count)).documents()) for index in range(count)]


@given(
    lines=st.lists(st.text(st.sampled_from("aé中 \r"), max_size=8), min_size=1, max_size=30),
    end=st.sampled_from(["\n", "\r\n"]),
    is_ended=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    count=st.integers(1, 9),
)
def test_each_line_of_a_text_is_in_one_shard_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[str],
    end: str,
    is_ended: bool,
    mark: str,
    count: int,
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    text = mark + end.join([*lines, "last"]) + end * is_ended
    path.write_bytes(text.encode())
    # Lines as in Python's text files: \n, \r\n and \r end them.
    expected = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    assert [line for shard in in_shards(path, count) for line in shard] == expected


@pytest.mark.parametrize("packed", [*COMPRESS][1:])
@pytest.mark.parametrize("name", ["lines.txt", "lines.jsonl"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_compressing_a_file_does_not_change_its_shards(
    tmp_path: Path, name: str, packed: str, count: int
) -> None:
    path = tmp_path / name
    texts = [f"document {'é' * (number % 50)} {number}" for number in range(500)]
    lines = texts if name == "lines.txt" else [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    compressed = tmp_path / f"{name}{packed}"
    compressed.write_bytes(COMPRESS[packed](path.read_bytes()))
    assert in_shards(compressed, count) == in_shards(path, count)


@given(rows=st.integers(1, 40), group=st.integers(1, 12), count=st.integers(1, 9), batch=st.integers(1, 7))
def test_each_row_of_a_parquet_file_is_in_one_shard_and_shards_are_even(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, count: int, batch: int
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    texts = [f"row {row}" for row in range(rows)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distilspeed.trainer.corpus.sources.READ_BATCH", batch)
        shards = in_shards(path, count)
    assert [text for shard in shards for text in shard] == texts
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json"])
@pytest.mark.parametrize("count", [2, 7])
def test_each_json_record_is_in_one_shard(tmp_path: Path, name: str, count: int) -> None:
    texts = [f"record {'é' * (number % 5)}\n{number}" for number in range(50)]
    path = tmp_path / name
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text(
        "\n".join(records) if name == "lines.jsonl" else f"[{','.join(records)}]", encoding="utf-8"
    )
    shards = in_shards(path, count)
    assert all(shards)
    assert [text for shard in shards for text in shard] == texts


@pytest.mark.parametrize("kind", ["saved", "one file streamed", "four files streamed"])
@pytest.mark.parametrize("count", [2, 3])
def test_each_document_of_a_dataset_is_in_one_shard(tmp_path: Path, kind: str, count: int) -> None:
    texts = [f"document {number}" for number in range(60)]
    records = datasets.Dataset.from_dict({"text": texts})
    if kind == "saved":
        records.save_to_disk(str(tmp_path))
    else:
        files = 1 if kind == "one file streamed" else 4
        for number in range(files):
            records.shard(files, number, contiguous=True).to_parquet(tmp_path / f"train-{number}.parquet")
    shards = [
        list(dataset_source(str(tmp_path), "text", Shard(index, count)).documents()) for index in range(count)
    ]
    assert sorted(text for shard in shards for text in shard) == sorted(texts)
    assert {len(shard) for shard in shards} == {60 // count}


def test_a_shard_reads_no_text_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "half.txt"
    path.write_bytes(b"good line\n" * 100 + b"bad line \xff\n" * 100)
    assert list(file_source(path, "text", Shard(0, 3)).documents()) == ["good line"] * 70
    with raises_user_error("not-utf8", "half.txt", "byte 1009"):
        file_source(path, "text", Shard(1, 3))


def test_a_bad_record_of_a_shard_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' * 10 + "{\n")
    with raises_user_error("not-json", "bad.jsonl", "line 5", "byte 84"):
        list(file_source(path, "text", Shard(1, 2)).documents())
