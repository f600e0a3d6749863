"""Documents from every kind of source, whole and in shards."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilspeed.trainer.corpus import WHOLE, Shard
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.sources import LONGEST_LINE, READ_BYTES, dataset_source, file_source


def write_json_array(records: datasets.Dataset, path: Path) -> None:
    path.write_text(json.dumps(list(records)), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("some.jsonl", lambda records, path: records.to_json(path)),
        ("some.json", lambda records, path: records.to_json(path)),
        ("array.json", write_json_array),
        ("some.parquet", lambda records, path: records.to_parquet(path)),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(
    some_text: Path, name: str, write: Callable[[datasets.Dataset, Path], None]
) -> None:
    lines = some_text.read_text(encoding="utf-8").splitlines()
    path = some_text.with_name(name)
    write(datasets.Dataset.from_dict({"id": range(len(lines) + 2), "body": [*lines, None, " \t"]}), path)
    assert list(file_source(path, "body").documents()) == lines
    assert list(file_source(some_text, "ignored").documents()) == lines


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


def test_a_byte_order_mark_and_line_ends_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufefffirst line\r\nsecond line\r\n\r\n".encode())
    assert list(file_source(path, "text").documents()) == ["first line", "second line"]


def test_half_a_surrogate_pair_in_json_does_not_stop_the_work(tmp_path: Path) -> None:
    path = tmp_path / "scraped.jsonl"
    path.write_text(json.dumps({"text": "an expression \ud83d in a statement"}) + "\n")
    assert list(file_source(path, "text").documents()) == ["an expression ? in a statement"]


@pytest.mark.parametrize("name", ["some.txt", "some.jsonl", "array.json", "some.parquet"])
@pytest.mark.parametrize("becomes", ["gone", "shorter", "another"])
def test_a_file_that_changes_before_it_is_read_ends_in_one_error(
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
    with pytest.raises(UserError, match=path.name):
        list(source.documents())


def test_a_line_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "endless.txt"
    with path.open("wb") as file:
        file.write(b"a line\n" + b"a" * (LONGEST_LINE + 2 * READ_BYTES))
    tracemalloc.start()
    for shard in (WHOLE, Shard(0, 2)):
        with pytest.raises(UserError, match="a line of more than 64 MiB at byte 7;"):
            file_source(path, "text", shard)
    assert tracemalloc.get_traced_memory()[1] < 10 * READ_BYTES
    tracemalloc.stop()


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
    # What Python's text files call lines: \n, \r\n and \r end them.
    expected = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    assert [line for shard in in_shards(path, count) for line in shard] == expected


@given(rows=st.integers(1, 40), group=st.integers(1, 12), count=st.integers(1, 9), batch=st.integers(1, 7))
def test_each_row_of_a_parquet_file_is_in_one_shard_and_shards_are_even(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, count: int, batch: int
) -> None:
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    texts = [f"row {row}" for row in range(rows)]
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distilspeed.trainer.sources.READ_BATCH", batch)
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
    with pytest.raises(UserError, match="not UTF-8 at byte 1009;"):
        file_source(path, "text", Shard(1, 3))


def test_a_bad_record_of_a_shard_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' * 10 + "{\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 5 after byte 84 is not JSON"):
        list(file_source(path, "text", Shard(1, 2)).documents())
