"""Where documents come from: text, JSON and Parquet files, dataset folders, the hub; all read as streams."""

import codecs
import json
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from distilspeed.trainer.corpus import SourceRecord, first_line
from distilspeed.trainer.errors import UserError

READ_BATCH = 1000  # documents read from a dataset at a time


@dataclass(frozen=True)
class Source:
    """Somewhere documents come from; ``read`` gives the text column's values, whatever they are."""

    record: SourceRecord
    read: Callable[[], Iterator[Any]]

    def documents(self) -> Generator[str]:
        """The documents that are not blank. ``UserError`` for what cannot be read or is not text."""
        for value in self.read():
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{self.record.name} holds {type(value).__name__} where text is expected; "
                    "name the field that holds the text with --text_column"
                )
            if value and not value.isspace():
                yield value


def file_source(path: Path, text_column: str) -> Source:
    """A Parquet, JSON (an object a line, or an array) or text file (a document a line), by its suffix."""
    if not path.is_file():
        raise UserError(f"the text file {path} does not exist; check --text")
    if not os.access(path, os.R_OK):
        raise UserError(f"the text file {path} may not be read; check its permissions")
    if path.stat().st_size == 0:
        raise UserError(f"the text file {path} is empty; leave it out or fill it")
    record = SourceRecord(path.name, path.stat().st_size)
    if path.suffix == ".parquet":
        return Source(record, lambda: _read_parquet(path, text_column))
    _check_utf8(path)
    if path.suffix in (".json", ".jsonl"):
        return Source(record, lambda: _read_json(path, text_column))
    return Source(record, lambda: _read_lines(path))


def dataset_source(specification: str, text_column: str) -> Source:
    """``NAME[:CONFIG[:SPLIT]]``: a folder where one exists (its name may hold colons), else a hub dataset."""
    parts = specification.split(":")
    if not parts[0]:
        raise UserError(f"--dataset {specification!r} names no dataset; give NAME[:CONFIG[:SPLIT]]")
    for used in range(len(parts), 0, -1):
        folder = Path(":".join(parts[:used]))
        if folder.exists():
            name, options = str(folder), parts[used:]
            break
    else:
        name, options = parts[0], parts[1:]
    if len(options) > 2:
        raise UserError(f"--dataset {specification} is not NAME[:CONFIG[:SPLIT]]; check it")
    if Path(name).is_file():
        raise UserError(f"--dataset {specification} is a file; give it as --text")
    config, split = (*(option or None for option in options), None, None)[:2]
    is_folder = Path(name).is_dir()
    size = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file()) if is_folder else None
    record = SourceRecord(":".join([Path(name).name if is_folder else name, *options]), size)
    return Source(record, lambda: _read_dataset(specification, name, config, split, text_column))


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 20)
            carried = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 at byte {offset - carried + error.start}; convert it to UTF-8"
                ) from error
            if not block:
                return
            offset += len(block)


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            yield line.rstrip("\n")


def _read_json(path: Path, text_column: str) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        if _first_character(file) == "[":
            for number, record in enumerate(_parse_json(file.read(), str(path)), start=1):
                yield _column_of(record, text_column, f"{path}, record {number}")
            return
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                where = f"{path}, line {number}"
                yield _column_of(_parse_json(line, where), text_column, where)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}; correct it") from error


def _first_character(file: Any) -> str:
    first = next((line.lstrip()[0] for line in file if not line.isspace()), "")
    file.seek(0)
    return first


def _column_of(record: Any, text_column: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object; give records with a field {text_column!r}")
    if text_column not in record:
        raise UserError(_no_column(where, text_column, record))
    value = record[text_column]
    # JSON can spell half of a surrogate pair ("\ud83d"), which is no character and cannot be tokenised.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _no_column(where: str, text_column: str, columns: Any) -> str:
    return f"{where} has no field {text_column!r} but {', '.join(columns)}; choose one with --text_column"


def _read_parquet(path: Path, text_column: str) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                raise UserError(_no_column(str(path), text_column, file.schema_arrow.names))
            for batch in file.iter_batches(READ_BATCH, columns=[text_column]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {first_line(error)}; check it") from error


def _read_dataset(
    specification: str, name: str, config: str | None, split: str | None, text_column: str
) -> Iterator[Any]:
    try:
        if any((Path(name) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            dataset = _load_saved_dataset(name, config or split)
        else:
            # Streaming: nothing is copied into a cache and memory does not grow with the dataset.
            dataset = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        if text_column in (dataset.column_names or ()):
            dataset = dataset.select_columns([text_column])
        for batch in dataset.iter(READ_BATCH):
            if text_column not in batch:
                raise UserError(_no_column(f"the dataset {specification}", text_column, batch))
            yield from batch[text_column]
    except UserError:
        raise
    except Exception as error:  # the hub, file systems and every format's reader have errors of their own
        raise UserError(
            f"the dataset {specification} cannot be read: {first_line(error)}; "
            "check its name, configuration and split, and the connection to the hub"
        ) from error


def _load_saved_dataset(folder: str, split: str | None) -> datasets.Dataset:
    saved = datasets.load_from_disk(folder, keep_in_memory=False)
    if isinstance(saved, datasets.DatasetDict):
        return saved[split or "train"]
    if split is not None:
        raise UserError(f"{folder} is a saved dataset without splits; leave {split!r} out")
    return saved
