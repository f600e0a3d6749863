"""The registry of task kinds, one line each, and the look-up for ``--task``."""

from collections.abc import Sequence

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.conll import Conll
from distilspeed.trainer.evaluation.tasks.glue import Glue
from distilspeed.trainer.evaluation.tasks.jsonl_classification import JsonLinesClassification
from distilspeed.trainer.evaluation.tasks.jsonl_regression import JsonLinesRegression
from distilspeed.trainer.evaluation.tasks.squad import Squad
from distilspeed.trainer.evaluation.tasks.task import Task

TASKS: list[type[Task]] = [
    JsonLinesRegression,
    JsonLinesClassification,
    Glue,
    Squad,
    Conll,
]


def read_tasks(names: Sequence[str]) -> list[Task]:
    """Read the tasks of a command line.

    Raises:
        UserError: a task cannot be read, or two tasks have the same name.
    """
    tasks = [_kind_of(name).read(name) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError(
            "conflicting-arguments",
            "two --task folders have the same name, which would be ambiguous in the report; rename one",
        )
    return tasks


def _kind_of(name: str) -> type[Task]:
    # An unknown name is read as a folder of JSON lines, so that the error names the missing file.
    return next((kind for kind in TASKS if kind.is_named(name)), JsonLinesClassification)
