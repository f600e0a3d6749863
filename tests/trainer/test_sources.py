"""Documents from every kind of source, whole and in shards."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from distilspeed.trainer.sources import dataset_source, file_source


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
