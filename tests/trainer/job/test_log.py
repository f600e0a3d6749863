"""Promises of the log: each message is one plain line, printed once, on the right stream."""

import logging
from collections.abc import Iterator

import pytest

from distilspeed.trainer.job.command import show_log

LOGGER = logging.getLogger("distilspeed")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    level, handlers = LOGGER.level, LOGGER.handlers
    yield
    LOGGER.setLevel(level)
    LOGGER.handlers = handlers


@pytest.mark.parametrize("facts_on_stderr", [False, True])
def test_facts_go_to_the_chosen_stream_and_warnings_to_standard_error(
    facts_on_stderr: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # as when a command runs another command in its process
        show_log(facts_on_stderr)
    logging.getLogger("distilspeed.trainer.training.loop").info("student written to %s", "run/student")
    logging.getLogger("distilspeed.kernels").warning("%s", "100 % of it is damaged")
    logging.getLogger("distilspeed").debug("nothing")
    printed = capsys.readouterr()
    fact, warning = "student written to run/student\n", "warning: 100 % of it is damaged\n"
    assert (printed.out, printed.err) == (("", fact + warning) if facts_on_stderr else (fact, warning))
