"""JSON-lines files of labelled sentences and pairs.

train.jsonl, dev.jsonl   objects with ``label`` and either ``text`` or ``text_a`` and ``text_b``
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.sentences import Example

TRAIN, DEV = "train.jsonl", "dev.jsonl"
Record = dict[str, Any]  # one line of a file
# Raises a UserError for a label that the task cannot have; the second argument names the line.
LabelCheck = Callable[[Any, str], None]


def has_scores(folder: Path) -> bool:
    """Return whether any label of the training examples is a number with a decimal point or exponent."""
    try:
        with (folder / TRAIN).open(encoding="utf-8") as file:
            records = map(json.loads, file)
            return any(
                isinstance(record, dict) and isinstance(record.get("label"), float) for record in records
            )
    except (OSError, ValueError, RecursionError):  # read_records reports it
        return False


def read_records(folder: Path, check_label: LabelCheck) -> dict[str, list[Record]]:
    """Read the two files of a task, by file name.

    Raises:
        UserError: a file is missing, empty or not JSON lines; a text is missing or no string; a label is refused; texts
            have different fields.
    """
    files = {file: _read_file(folder / file, check_label) for file in (TRAIN, DEV)}
    if len({_text_fields(record) for records in files.values() for record in records}) > 1:
        raise UserError(
            "bad-task",
            f'the task {folder} mixes "text" with "text_a", "text_b"; use one of the two throughout',
        )
    return files


def example_of(record: Record, label: int | float) -> Example:
    # JSON can contain half of a surrogate pair ("\ud83d"), which is not a character and cannot be tokenised.
    texts = [record[field].encode("utf-8", "replace").decode() for field in _text_fields(record)]
    text, pair = (*texts, None)[:2]
    return Example(text, pair, label)


def _read_file(path: Path, check_label: LabelCheck) -> list[Record]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            records = [
                _parse(line, f"{path}, line {number}", check_label)
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    except OSError as error:
        raise UserError(
            "bad-task",
            f"cannot read {path}: {error.strerror}; a task is a folder with {TRAIN} and {DEV}",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError("bad-task", f"{path} is not UTF-8; convert it to UTF-8") from error
    if not records:
        raise UserError("bad-task", f"{path} is empty; a task needs training and dev examples")
    return records


def _parse(line: str, where: str, check_label: LabelCheck) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            "bad-task", f"{where} is not valid JSON: {error}; write one object per line"
        ) from error
    if not isinstance(record, dict):
        raise UserError("bad-task", f"{where} is not an object; write one object per line")
    if not all(isinstance(record.get(field), str) for field in _text_fields(record)):
        raise UserError("bad-task", f'{where} needs strings "text", or "text_a" and "text_b"; correct it')
    check_label(record.get("label"), where)
    return record


def _text_fields(record: Record) -> tuple[str, ...]:
    return ("text",) if "text" in record else ("text_a", "text_b")
