"""The kinds of task, one line each, and how ``--task`` finds them."""

from collections.abc import Sequence

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.jsonl_classification import JsonLinesClassification
from distilspeed.trainer.evaluation.tasks.task import Task

TASKS: list[type[Task]] = [
    JsonLinesClassification,
]


def read_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks that a command names.

    Raises:
        UserError: one cannot be read, or two would have the same name in the report.
    """
    tasks = [_kind_of(name).read(name) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise UserError(
            "conflicting-arguments",
            "two --task folders have the same name; the report could not tell them apart, rename one",
        )
    return tasks


def _kind_of(name: str) -> type[Task]:
    # What no kind knows is taken for a folder of JSON lines, whose error says what is missing.
    return next((kind for kind in TASKS if kind.is_named(name)), JsonLinesClassification)
