"""Data sets of tasks on the hub."""

from typing import Any

from distilspeed.trainer.errors import UserError, first_line


def load_split(task: str, repository: str, config: str | None, split: str, instead: str) -> Any:
    """Load a split of a data set.

    Args:
        task: its name in the error message.
        instead: what a user without a connection can do ("give …").

    Raises:
        UserError: the split cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # the hub, the file system and datasets raise many types
        raise UserError(
            "bad-task",
            f"cannot load {task} from the hub: {first_line(error)}; check the connection, or {instead}",
        ) from error
