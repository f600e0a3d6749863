"""Errors that end a command, and the line that reports them."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

# What can be wrong with a command's input. Scripts and tests rely on these codes; docs/errors.md explains them.
UserErrorCode = Literal[
    "bad-argument",
    "bad-config",
    "bad-ranks",
    "bad-record",
    "bad-task",
    "changed-benchmark",
    "changed-build",
    "changed-ranks",
    "changed-run",
    "conflicting-arguments",
    "conflicting-config",
    "damaged-build",
    "damaged-checkpoint",
    "damaged-corpus",
    "damaged-model",
    "damaged-record",
    "failed-build",
    "failed-step",
    "finished-run",
    "indivisible-batch",
    "line-too-long",
    "locked",
    "missing-argument",
    "missing-field",
    "missing-file",
    "missing-package",
    "no-gpu",
    "no-text",
    "not-a-corpus",
    "not-enough-text",
    "not-json",
    "not-plain-text",
    "not-utf8",
    "objective-mismatch",
    "out-of-memory",
    "output-exists",
    "output-inside-input",
    "pickled-weights",
    "rows-too-long",
    "shard-mismatch",
    "slower-than-before",
    "tokenizer-mismatch",
    "unfinished-build",
    "unknown-config-key",
    "unreadable-config",
    "unreadable-file",
    "unshared-output",
    "unsuitable-schedule",
    "unsupported-format",
    "unsupported-model",
    "unsupported-optimizer",
    "unsupported-precision",
    "unsupported-scheduler",
    "unusable-dataset",
    "unusable-hub",
    "unusable-kernels",
    "unusable-model",
    "unusable-tokenizer",
    "unwritable-output",
    "wrong-package",
]


class CommandError(Exception):
    """The base of errors that end a command with one line and their own exit status.

    Attributes:
        status: the exit status.
        code: a stable name of the error; the message may be reworded.
        ranks_agree: the ranks have chosen this one to report the error (job/watch.py).
    """

    status: int
    code: str
    label = "error"
    ranks_agree = False


class UserError(CommandError):
    """An error that the user can correct; its message is ``what is wrong; what to do``."""

    status = 2

    def __init__(self, code: UserErrorCode, message: str) -> None:
        super().__init__(code, message)  # both, because a process pool recreates the error from its arguments
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class NumericalError(CommandError):
    """A loss or gradient is not finite, and fp16 overflow is not the cause."""

    status = 3
    code = "not-finite"


class OverflowAtLowestScale(NumericalError):
    """fp16 gradients overflow at a loss scale that cannot fall further."""

    code = "fp16-overflow"

    def __init__(self, scale: float) -> None:
        super().__init__(
            f"gradients overflow in fp16 at a loss scale of {scale:g}, which cannot fall further; resume from the "
            "newest checkpoint (--resume) with a lower learning rate, or start over in bf16 or fp32"
        )


class LostRankError(CommandError):
    """A rank died or does not respond."""

    status = 4
    code = "lost-rank"


class StoppedError(CommandError):
    """The job received a request to stop and has saved a checkpoint."""

    status = 75  # EX_TEMPFAIL in sysexits.h: the user should try again
    code = "stopped"
    label = "stopped"


def status_of(error: BaseException) -> int:
    """Return the exit status of a command that ends with this exception."""
    if isinstance(error, CommandError):
        return error.status
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.code, int | None):
        return error.code or 0
    return 1  # as Python exits after an uncaught exception


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, and the second line if the first ends in a colon."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first, *others[:1]] if first.endswith(":") else [first]).rstrip(".")


@contextmanager
def memory_errors_named() -> Iterator[None]:
    """Turn the errors with which PyTorch and NumPy report too little memory into a :class:`UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Known by its name, because this module does not import torch; it has none of its own for CPUs.
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not known and "can't allocate memory" not in str(error):
            raise
        asked = re.search(r"(?i)(?:tried to|unable to) allocate ([\d.]+ \w+)", str(error))
        found = f": {asked[1]} could not be allocated" if asked else ""
        raise UserError(
            "out-of-memory", f"out of memory{found}; use a smaller batch, or a device with more memory"
        ) from error


def show_error(error: CommandError) -> None:
    """Print an error as one line on stderr; any rank and any thread may call this."""
    rank = environment_rank()
    line = f"{error.label}: {' '.join(str(error).split())} [{error.code}]"
    if rank:
        line = f"\n{line} (rank {rank})"  # a new line, because rank 0's progress bar occupies the current one
    print(line, file=sys.stderr, flush=True)


def environment_rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0
