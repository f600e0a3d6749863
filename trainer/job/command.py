"""How every command runs: its environment, its log, and how it reports an error."""

import argparse
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from distilspeed.trainer.errors import (
    CommandError,
    UserError,
    UserErrorCode,
    environment_rank,
    memory_errors_named,
    show_error,
    status_of,
)
from distilspeed.trainer.job.environment import prepare_environment

# A rank other than 0 waits this long, in case rank 0 reports the same problem: the launcher ends the other ranks when
# rank 0 exits. After that it assumes that the problem is its own, and reports it.
SECONDS_FOR_RANK_0_TO_SPEAK = 60.0


class PlainParser(argparse.ArgumentParser):
    """An argument parser that reports an invalid command line as a :class:`UserError`: one line, no usage text.

    It expands ``~`` in every path and string, because the shell does not after ``=`` (no hub id begins with ``~``).
    It needs no third-party package. ``parser.py`` makes a parser from dataclasses.
    """

    # What the user typed instead of the script's name, such as "distilspeed train".
    typed: ClassVar[str | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        options["allow_abbrev"] = False
        super().__init__(*args, **options)
        self.prog = self.typed or self.prog
        # Path.expanduser raises an error if the user does not exist.
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))  # noqa: PTH111
        for text_type in (None, str):
            self.register("type", text_type, os.path.expanduser)

    def error(self, message: str) -> NoReturn:
        code: UserErrorCode = "bad-argument"
        if "arguments are required" in message:  # argparse's errors differ only in their text
            code = "missing-argument"
        elif "not allowed with argument" in message:
            code = "conflicting-arguments"
        raise UserError(code, f"{message}; see {self.prog} --help")


def with_default(text: str, default: object) -> str:
    """Return the help of a flag with its default appended, unless there is none or the text mentions it."""
    unsaid = default is None or default is False or default in ((), [], "", argparse.SUPPRESS)
    if unsaid or text == argparse.SUPPRESS or "default" in text:
        return text
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{text} (default {' '.join(shown) if isinstance(shown, list) else shown})"


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` in the prepared environment, then exit with 0 or the status of a :class:`CommandError`.

    One rank reports the error as one line on stderr, ``error: what is wrong; what to do``. With ``--debug`` on the
    command line Python shows the traceback instead.
    """
    try:
        show_log()
        prepare_environment()
        with memory_errors_named():
            main()
    except CommandError as error:
        if "--debug" in sys.argv:
            raise
        if not error.ranks_agree and environment_rank() > 0:
            time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        show_error(error)
        sys.exit(status_of(error))
    except KeyboardInterrupt as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(status_of(error))
    sys.exit(0)


class _Lines(logging.Handler):
    def __init__(self, facts_on_stderr: bool) -> None:
        super().__init__()
        self.facts_on_stderr = facts_on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        line = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        # Look up the streams at each call, because tests replace them.
        print(line, file=sys.stderr if is_warning or self.facts_on_stderr else sys.stdout, flush=True)


def show_log(facts_on_stderr: bool = False) -> None:
    """Print this project's log, one line per message: INFO on stdout or stderr, ``warning: …`` on stderr.

    Args:
        facts_on_stderr: print INFO on stderr, for a command that prints a result on stdout.
    """
    logger = logging.getLogger("distilspeed")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Lines(facts_on_stderr)]


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import DeepSpeed and transformers in about three quarters of the time, by not collecting garbage meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def quiet_libraries() -> None:
    """Show only errors of transformers and the hub; this project logs what users need to know."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # DeepSpeed calls functions that torch has renamed; users cannot change that.
    warnings.filterwarnings(
        "ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning
    )
