"""Where documents come from: text, JSON and Parquet files, dataset folders, the hub; all read as streams.

Every source can be read in shards, each document in exactly one of them. Files of lines are divided by bytes, at
line ends, and Parquet files by rows: a shard reads no text of the others. Of 94 MB of Gutenberg prose in 16 shards
the largest is 0.5 % above the mean by bytes; by numbers of lines it would be 20 % (November 2026). Saved
datasets are divided by rows and streamed ones as `datasets` divides them between nodes.
"""

import codecs
import json
import math
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets.distributed import split_dataset_by_node

from distilspeed.trainer.corpus import WHOLE, Shard, SourceRecord
from distilspeed.trainer.errors import UserError, first_line

READ_BATCH = 1000  # documents read from a dataset at a time
READ_BYTES = 1 << 20  # of a file, at a time
# A longer line, give or take READ_BYTES, is refused: one as long takes 2 GB to prepare (November 2026).
LONGEST_LINE = 64 << 20
BYTE_ORDER_MARK = "\ufeff".encode()


@dataclass(frozen=True)
class Source:
    """Somewhere documents come from; ``read`` gives the text column's values, whatever they are.

    ``record`` names the whole source, whatever shard of it is read.
    """

    record: SourceRecord
    read: Callable[[], Iterator[Any]]

    def documents(self) -> Generator[str]:
        """The documents that are not blank. ``UserError`` for what cannot be read or is not text."""
        try:
            for value in self.read():
                if value is not None and not isinstance(value, str):
                    raise UserError(
                        f"{self.record.name} holds {type(value).__name__} where text is expected; "
                        "name the field that holds the text with --text_column"
                    )
                if value and not value.isspace():
                    yield value
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise UserError(f"{self.record.name} cannot be read: {first_line(error)}; check it") from error


def file_source(path: Path, text_column: str, shard: Shard = WHOLE) -> Source:
    """A Parquet, JSON (an object a line, or an array) or text file (a document a line), by its suffix.

    An array is read whole, anything else in parts. ``UserError`` for what is no file, or no text in UTF-8;
    ``OSError`` for what cannot be read.
    """
    if not path.is_file():
        raise UserError(f"there is no text file {path}; check --text (a folder goes with --dataset)")
    if path.stat().st_size == 0:
        raise UserError(f"the text file {path} is empty; leave it out or fill it")
    record = SourceRecord(path.name, path.stat().st_size)
    if path.suffix == ".parquet":
        return Source(record, lambda: _read_parquet(path, text_column, shard))
    is_json = path.suffix in (".json", ".jsonl")
    if is_json and _begins_as_array(path):
        _check_text(path, range(path.stat().st_size), math.inf)
        return Source(record, lambda: _read_json_array(path, text_column, shard))
    with path.open("rb") as file:
        lines = _lines_of(file, shard)
    _check_text(path, lines, LONGEST_LINE)
    if is_json:
        return Source(record, lambda: _read_json_lines(path, text_column, lines))
    return Source(record, lambda: _read_lines(path, lines))


def dataset_source(specification: str, text_column: str, shard: Shard = WHOLE) -> Source:
    """``NAME[:CONFIG[:SPLIT]]``: a folder where one exists (its name may hold colons), else a hub dataset."""
    name, *options = split_specification(specification)
    if not name:
        raise UserError(f"--dataset {specification!r} names no dataset; give NAME[:CONFIG[:SPLIT]]")
    if len(options) > 2:
        raise UserError(f"--dataset {specification} is not NAME[:CONFIG[:SPLIT]]; check it")
    if Path(name).is_file():
        raise UserError(f"--dataset {specification} is a file; give it as --text")
    config, split = (*(option or None for option in options), None, None)[:2]
    is_folder = Path(name).is_dir()
    size = sum(file.stat().st_size for file in Path(name).rglob("*") if file.is_file()) if is_folder else None
    record = SourceRecord(":".join([Path(name).name if is_folder else name, *options]), size)
    return Source(record, lambda: _read_dataset(specification, name, config, split, text_column, shard))


def split_specification(specification: str) -> list[str]:
    """Name or folder of a dataset, and the configuration and split that follow it."""
    parts = specification.split(":")
    for used in range(len(parts), 0, -1):
        folder = ":".join(parts[:used])
        if Path(folder).exists():
            return [folder, *parts[used:]]
    return parts


def _lines_of(file: BinaryIO, shard: Shard) -> range:
    """The bytes of the lines that begin in a shard's part of a file."""
    part = shard.of(file.seek(0, os.SEEK_END))
    return range(_next_line(file, part.start), _next_line(file, part.stop))


def _next_line(file: BinaryIO, offset: int) -> int:
    """Where the first line begins that begins at ``offset`` or later."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    while (part := file.readline(READ_BYTES)) and not part.endswith(b"\n"):
        pass
    return file.tell()


def _check_text(path: Path, lines: range, longest_line: float) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = line_start = lines.start
    with path.open("rb") as file:
        file.seek(offset)
        while True:
            block = file.read(min(READ_BYTES, lines.stop - offset))
            carried = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 at byte {offset - carried + error.start}; "
                    "convert it to UTF-8, or unpack it if it is compressed"
                ) from error
            if not block:
                return
            if (place := block.find(b"\0")) >= 0:
                raise UserError(
                    f"{path} is binary or UTF-16: byte {offset + place} is 0; convert it to UTF-8"
                )
            if (end := block.rfind(b"\n")) >= 0:
                line_start = offset + end + 1
            offset += len(block)
            if offset - line_start > longest_line:
                raise UserError(
                    f"{path} has a line of more than {LONGEST_LINE >> 20} MiB at byte {line_start}; "
                    "give it a line for each document"
                )


def _read_lines(path: Path, lines: range) -> Iterator[str]:
    """The lines in a range of bytes, without their ends: \\n, \\r\\n or \\r."""
    with path.open("rb") as file:
        file.seek(lines.start)
        left = len(lines)
        while left > 0:
            line = file.readline()
            if not line:
                raise OSError("it has become shorter")
            if left == len(lines) and lines.start == 0:
                left -= len(BYTE_ORDER_MARK) if line.startswith(BYTE_ORDER_MARK) else 0
                line = line.removeprefix(BYTE_ORDER_MARK)
            left -= len(line)
            # A file of an old Macintosh is one line to readline().
            for part in line.splitlines():
                yield part.decode("utf-8")


def _begins_as_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(READ_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _read_json_array(path: Path, text_column: str, shard: Shard) -> Iterator[Any]:
    records = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    for number in shard.of(len(records)):
        yield _column_of(records[number], text_column, f"{path}, record {number + 1}")


def _read_json_lines(path: Path, text_column: str, lines: range) -> Iterator[Any]:
    after = f" after byte {lines.start}" if lines.start else ""
    for number, line in enumerate(_read_lines(path, lines), start=1):
        if line and not line.isspace():
            where = f"{path}, line {number}{after}"
            yield _column_of(_parse_json(line, where), text_column, where)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}; correct it") from error


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


def _read_parquet(path: Path, text_column: str, shard: Shard) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if text_column not in file.schema_arrow.names:
            raise UserError(_no_column(str(path), text_column, file.schema_arrow.names))
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
            # Streaming: nothing is copied into a cache and memory does not grow with the dataset.
            dataset = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        if text_column in (dataset.column_names or ()):
            dataset = dataset.select_columns([text_column])
        if shard != WHOLE:
            dataset = split_dataset_by_node(dataset, shard.index, shard.count)
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
