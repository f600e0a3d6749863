"""Errors that end a command, and the one line by which they are shown."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_STATUS = 2
NUMERICAL_ERROR_STATUS = 3

# A rank other than 0 gives rank 0 this long to report the same problem (the launcher ends the
# others when rank 0 exits) before it concludes that the problem is its own and speaks.
SECONDS_FOR_RANK_0_TO_SPEAK = 10.0


class UserError(Exception):
    """Something the person who started the command can put right: ``what is wrong; what to do``."""

    status = USER_ERROR_STATUS


class NumericalError(Exception):
    """A loss or gradient that is not finite and is not an fp16 overflow."""

    status = NUMERICAL_ERROR_STATUS


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as a :class:`UserError`: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit: 0, or 2 for a :class:`UserError`, 3 for a :class:`NumericalError`.

    The error is one line on stderr, ``error: what is wrong; what to do``, from rank 0 only. With
    ``--debug`` on the command line the traceback is shown as well.
    """
    try:
        main()
    except (UserError, NumericalError) as error:
        if "--debug" in sys.argv:
            raise
        _show(error)
        sys.exit(error.status)
    sys.exit(0)


def _show(error: Exception) -> None:
    rank = int(os.environ.get("RANK", "0"))
    line = " ".join(str(error).split())
    if rank == 0:
        print(f"error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_RANK_0_TO_SPEAK)
        print(f"error: {line} (rank {rank})", file=sys.stderr, flush=True)


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
