"""How every command runs: its environment, and the one line of an error."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from distilspeed.trainer.errors import (
    CommandError,
    UserError,
    UserErrorCode,
    environment_rank,
    show_error,
    status_of,
)
from distilspeed.trainer.job.environment import prepare_environment

# A rank other than 0 gives rank 0 this long to report the same problem (the launcher ends the
# others when rank 0 exits) before it concludes that the problem is its own and speaks.
SECONDS_FOR_RANK_0_TO_SPEAK = 60.0


class PlainParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as a :class:`UserError`: one line, no usage text.

    It expands ``~`` in every path and string (no hub id begins with it): after an ``=`` no shell does. It needs no
    package; ``parser.py`` makes one from dataclasses.
    """

    # What the person typed instead of a script's name, "distilspeed train" for example.
    typed: ClassVar[str | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        options["allow_abbrev"] = False
        super().__init__(*args, **options)
        self.prog = self.typed or self.prog
        # Path.expanduser raises where there is no such user.
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))  # noqa: PTH111
        for text_type in (None, str):
            self.register("type", text_type, os.path.expanduser)

    def error(self, message: str) -> NoReturn:
        code: UserErrorCode = "bad-argument"
        if "arguments are required" in message:  # argparse tells its errors apart by their text alone
            code = "missing-argument"
        elif "not allowed with argument" in message:
            code = "conflicting-arguments"
        raise UserError(code, f"{message}; see {self.prog} --help")


def with_default(text: str, default: object) -> str:
    """The help of a flag with its default, unless there is none or the text says it."""
    unsaid = default is None or default is False or default in ((), [], "", argparse.SUPPRESS)
    if unsaid or text == argparse.SUPPRESS or "default" in text:
        return text
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{text} (default {' '.join(shown) if isinstance(shown, list) else shown})"


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` in the prepared environment and exit: 0, or with the status of a :class:`CommandError`.

    The error is one line on stderr, ``error: what is wrong; what to do``, from one rank only. With
    ``--debug`` on the command line the traceback is shown as well.
    """
    try:
        show_log()
        prepare_environment()
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
        # The streams of now: a test replaces them.
        print(line, file=sys.stderr if is_warning or self.facts_on_stderr else sys.stdout, flush=True)


def show_log(facts_on_stderr: bool = False) -> None:
    """Show what this project logs, a line each: facts (INFO) on stdout or stderr, ``warning: …`` on stderr.

    Args:
        facts_on_stderr: for a command that prints a result.
    """
    logger = logging.getLogger("distilspeed")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Lines(facts_on_stderr)]


def quiet_libraries() -> None:
    """Let transformers and the hub say only what is an error: the rest is in this project's lines, or in its way."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # DeepSpeed's calls of names that torch renames; nobody who runs this can change them.
    warnings.filterwarnings(
        "ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning
    )
