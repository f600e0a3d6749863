"""Sources of documents: text, JSON and Parquet files, dataset folders, and the hub; all are read as streams.

Every source can be read in shards; each document is in exactly one shard. Files of lines are split by bytes, between
documents. Parquet files and saved datasets are split by rows. Streamed datasets are split as `datasets` splits them
between nodes. A shard of a file reads no text of the others, but decompresses a compressed file up to its own part.
Splitting by bytes keeps shards even: with 16 shards of 94 MB of Gutenberg prose, the largest is 0.5 % above the mean;
split by number of lines, it would be 20 % above (November 2026).
"""

import json
import math
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.distributed import split_dataset_by_node

from distilspeed.trainer.corpus.arguments import Separator
from distilspeed.trainer.corpus.format import SourceRecord
from distilspeed.trainer.corpus.lines import check_text, lines_of, read_lines, read_paragraphs
from distilspeed.trainer.corpus.recognition import Format, InputFile
from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.corpus.tokenization import is_blank
from distilspeed.trainer.errors import UserError, first_line

READ_BATCH = 1000  # documents read from a dataset at a time


@dataclass(frozen=True)
class Source:
    """A source of documents; ``read`` yields the values of the text column, of any type.

    ``record`` describes the whole source, even if only a shard is read. ``is_plain_text``: a file without records.
    """

    record: SourceRecord
    read: Callable[[], Iterator[Any]]
    is_plain_text: bool = False

    def documents(self) -> Generator[str]:
        """Yield the documents that are not blank; raises as :meth:`values` does."""
        return (value for value in self.values() if value is not None and not is_blank(value))

    def values(self) -> Generator[str | None]:
        """Yield all documents, including null and blank ones; raise ``UserError`` if unreadable or not text."""
        try:
            for value in self.read():
                if value is not None and not isinstance(value, str):
                    raise UserError(
                        "bad-record",
                        f"{self.record.name} has {type(value).__name__} where text is expected; "
                        "choose the text field with --text_column",
                    )
                yield value
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise UserError(
                "unreadable-file", f"cannot read {self.record.name}: {first_line(error)}; check the file"
            ) from error


def file_source(path: Path, text_column: str, shard: Shard = WHOLE, separator: Separator = "line") -> Source:
    """Open a Parquet, JSON (lines or array) or text file; recognition.py detects which.

    In plain text a document is a line, or with ``separator`` "blank_line" the lines between blank lines. A JSON array
    is read whole, anything else in parts. Raises ``UserError`` if it is not a file or not UTF-8 text, ``OSError`` if it
    cannot be read.
    """
    if not path.is_file():
        raise UserError(
            "missing-file", f"there is no text file {path}; check --text (give folders as --dataset)"
        )
    record = SourceRecord(path.name, path.stat().st_size)
    file = InputFile.of(path)
    if record.bytes == 0 or (file.unpack is not None and _is_empty(file)):
        raise UserError("no-text", f"the text file {path} is empty; leave it out or add text")
    form = file.format()
    if form is Format.PARQUET:
        return Source(record, lambda: _read_parquet(path, text_column, shard))
    if form is Format.JSON_ARRAY:
        check_text(file, range(sys.maxsize), math.inf)
        return Source(record, lambda: _read_json_array(file, text_column, shard))
    if form is Format.JSON_LINES:
        lines = lines_of(file, shard, "line")
        return Source(record, lambda: _read_json_lines(file, text_column, lines))
    lines = lines_of(file, shard, separator)
    read = read_lines if separator == "line" else read_paragraphs
    return Source(record, lambda: read(file, lines), is_plain_text=True)


def dataset_source(specification: str, text_column: str, shard: Shard = WHOLE) -> Source:
    """Open ``NAME[:CONFIG[:SPLIT]]``: a folder if it exists (its name may contain colons), else a hub dataset."""
    name, *options = split_specification(specification)
    if not name:
        raise UserError(
            "bad-argument", f"--dataset {specification!r} has no name; give NAME[:CONFIG[:SPLIT]]"
        )
    if len(options) > 2:
        raise UserError("bad-argument", f"--dataset {specification} is not NAME[:CONFIG[:SPLIT]]; check it")
    if Path(name).is_file():
        raise UserError("bad-argument", f"--dataset {specification} is a file; give it as --text")
    config, split = (*(option or None for option in options), None, None)[:2]
    is_folder = Path(name).is_dir()
    size = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file()) if is_folder else None
    record = SourceRecord(":".join([Path(name).name if is_folder else name, *options]), size)
    return Source(record, lambda: _read_dataset(specification, name, config, split, text_column, shard))


def split_specification(specification: str) -> list[str]:
    """Split a specification into the dataset's name or folder, and the configuration and split after it."""
    parts = specification.split(":")
    for used in range(len(parts), 0, -1):
        folder = ":".join(parts[:used])
        if Path(folder).exists():
            return [folder, *parts[used:]]
    return parts


def _is_empty(file: InputFile) -> bool:
    with file.open() as content:
        return not content.read(1)


def _read_json_array(file: InputFile, text_column: str, shard: Shard) -> Iterator[Any]:
    where = _json_file(file)
    with file.open() as content:
        records = _parse_json(content.read().decode("utf-8-sig"), where)
    for number in shard.of(len(records)):
        yield _column_of(records[number], text_column, f"{where}, record {number + 1}")


def _read_json_lines(file: InputFile, text_column: str, lines: range) -> Iterator[Any]:
    after = f" after byte {lines.start}" if lines.start else ""
    for number, line in enumerate(read_lines(file, lines), start=1):
        if not is_blank(line):
            where = f"{_json_file(file)}, line {number}{after}"
            yield _column_of(_parse_json(line, where), text_column, where)


def _json_file(file: InputFile) -> str:
    return str(file.path) if file.is_named_json() else f"{file.path}, which begins like JSON"


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("not-json", f"{where} is not valid JSON: {error}; correct it") from error


def _column_of(record: Any, text_column: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise UserError("bad-record", f"{where} is not an object; give objects with a field {text_column!r}")
    if text_column not in record:
        raise UserError("missing-field", _no_column(where, text_column, record))
    value = record[text_column]
    # JSON can contain half of a surrogate pair ("\ud83d"), which is not a character and cannot be tokenised.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _no_column(where: str, text_column: str, columns: Any) -> str:
    if not columns:
        return f"{where} has no fields; give records with a field {text_column!r}"
    return f"{where} has no field {text_column!r}, only {', '.join(columns)}; choose one with --text_column"


def _read_parquet(path: Path, text_column: str, shard: Shard) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if text_column not in file.schema_arrow.names:
            raise UserError("missing-field", _no_column(str(path), text_column, file.schema_arrow.names))
        rows = shard.of(file.metadata.num_rows)
        end = 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if end <= rows.start or rows.stop <= begin:
                continue
            for batch in file.iter_batches(READ_BATCH, row_groups=[group], columns=[text_column]):
                ours = batch.slice(max(0, rows.start - begin), max(0, rows.stop - max(begin, rows.start)))
                yield from ours.column(0).to_pylist()
                begin += len(batch)


def _read_dataset(
    specification: str, name: str, config: str | None, split: str | None, text_column: str, shard: Shard
) -> Iterator[Any]:
    try:
        if any((Path(name) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
            dataset = _load_saved_dataset(name, config or split)
        else:
            # Streaming copies nothing into a cache, and memory does not grow with the dataset.
            dataset = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        if text_column in (dataset.column_names or ()):
            dataset = dataset.select_columns([text_column])
        if shard != WHOLE:
            dataset = split_dataset_by_node(dataset, shard.index, shard.count)
        for batch in dataset.iter(READ_BATCH):
            if text_column not in batch:
                raise UserError(
                    "missing-field", _no_column(f"the dataset {specification}", text_column, batch)
                )
            yield from batch[text_column]
    except UserError:
        raise
    except Exception as error:  # the hub, file systems and format readers raise many types
        if (cache := _unwritable_cache(error)) is not None:
            raise UserError(
                "unwritable-output",
                f"cannot write the cache of datasets: {cache}; "
                "set HF_HOME or HF_DATASETS_CACHE to a writable folder",
            ) from error
        raise UserError(
            "unusable-dataset",
            f"cannot read the dataset {specification}: {first_line(error)}; "
            "check its name, configuration and split, and the connection to the hub",
        ) from error


def _unwritable_cache(error: Exception) -> str | None:
    """Return what is wrong with the cache of `datasets` if ``error`` comes from it, else None.

    `datasets` writes a file there even for a streamed dataset.
    """
    if not isinstance(error, OSError) or not isinstance(error.filename, str):
        return None
    failed, cache = Path(error.filename).absolute(), Path(datasets.config.HF_DATASETS_CACHE).absolute()
    if failed in (cache, *cache.parents) or cache in failed.parents:
        return f"{failed}: {error.strerror}"
    return None


def _load_saved_dataset(folder: str, split: str | None) -> datasets.Dataset:
    saved = datasets.load_from_disk(folder, keep_in_memory=False)
    if isinstance(saved, datasets.DatasetDict):
        return saved[split or "train"]
    if split is not None:
        raise UserError(
            "unusable-dataset", f"{folder} is a saved dataset without splits; leave out {split!r}"
        )
    return saved
