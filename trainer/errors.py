"""Errors that end a command, and the one line by which they are shown."""

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from distilspeed.trainer.environment import prepare_environment

# A rank other than 0 gives rank 0 this long to report the same problem (the launcher ends the
# others when rank 0 exits) before it concludes that the problem is its own and speaks.
SECONDS_FOR_RANK_0_TO_SPEAK = 60.0


class CommandError(Exception):
    """Ends a command with one line and a status of its own.

    Attributes:
        ranks_agree: this rank has been chosen to say it (watch.py).
    """

    status: int
    label = "error"
    ranks_agree = False


class UserError(CommandError):
    """Something the person who started the command can put right: ``what is wrong; what to do``."""

    status = 2


class NumericalError(CommandError):
    """A loss or gradient that is not finite and is not an fp16 overflow."""

    status = 3


class OverflowAtLowestScale(NumericalError):
    """fp16 gradients overflow at a loss scale that does not fall any further."""

    def __init__(self, scale: float) -> None:
        super().__init__(
            f"the gradients overflow fp16 at a loss scale of {scale:g}, which does not fall any further; go on from "
            "the newest checkpoint (--resume) with a lower learning rate, or start anew in bf16 or fp32"
        )


class LostRankError(CommandError):
    """A rank has died or does not answer."""

    status = 4


class StoppedError(CommandError):
    """The job was told to stop, and has saved a checkpoint."""

    status = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
    label = "stopped"


def status_of(error: BaseException) -> int:
    """The exit status of a command that an exception ends."""
    if isinstance(error, CommandError):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    return 1  # Python's, of one that nobody catches


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for one of ours: a line, or two where it ends in a colon."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first, *others[:1]] if first.endswith(":") else [first]).rstrip(".")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as a :class:`UserError`: one line, no usage text.

    It expands ``~`` in every path and string (no hub id begins with it): after an ``=`` no shell does.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", None, os.path.expanduser)
        # Path.expanduser raises where there is no such user.
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))  # noqa: PTH111

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` in the prepared environment and exit: 0, or with the status of a :class:`CommandError`.

    The error is one line on stderr, ``error: what is wrong; what to do``, from one rank only. With
    ``--debug`` on the command line the traceback is shown as well.
    """
    try:
        prepare_environment()
        main()
    except CommandError as error:
        if "--debug" in sys.argv:
            raise
        if not error.ranks_agree and _rank() > 0:
            time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        show_error(error)
        sys.exit(status_of(error))
    except KeyboardInterrupt as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(status_of(error))
    sys.exit(0)


def show_error(error: CommandError) -> None:
    """The one line of an error, which may be said by any rank and from any thread."""
    rank = _rank()
    line = f"{error.label}: {' '.join(str(error).split())}"
    if rank:
        line = f"\n{line} (rank {rank})"  # rank 0's progress bar stands in the last line
    print(line, file=sys.stderr, flush=True)


def show_warning(message: str) -> None:
    """One line on stderr about something that does not end the command; call it on one rank only."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


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
