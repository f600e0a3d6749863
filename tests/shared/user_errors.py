"""Check errors by their code and by the flag, path, key or value that they name, because the wording may change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distilspeed.trainer.errors import UserError, UserErrorCode


@contextmanager
def raises_user_error(code: UserErrorCode, *named: str) -> Iterator[None]:
    """Assert that the block raises a UserError with this code, whose message contains all of ``named``."""
    with pytest.raises(UserError) as caught:
        yield
    error = caught.value
    assert error.code == code, f"{error} [{error.code}]"
    _assert_all_in(str(error), named)


def assert_names(line: str, code: str, *named: str) -> None:
    """Assert that a line of a command's standard error ends with this code and contains all of ``named``."""
    assert re.search(rf" \[{code}\]( \(rank \d+\))?$", line), line
    _assert_all_in(line, named)


def _assert_all_in(text: str, named: tuple[str, ...]) -> None:
    missing = [part for part in named if part not in text]
    assert not missing, f"{missing} not in: {text}"
