"""Errors that end a command, and the one line by which they are shown."""

import os
import signal
import sys
from typing import Literal

# What can be wrong with a command's input. Scripts and tests go by these; docs/errors.md explains them.
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
    """Ends a command with one line and a status of its own.

    Attributes:
        status: the exit status.
        code: a stable name for what is wrong; the words of the message may change.
        ranks_agree: this rank has been chosen to say it (job/watch.py).
    """

    status: int
    code: str
    label = "error"
    ranks_agree = False


class UserError(CommandError):
    """Something the person who started the command can put right: ``what is wrong; what to do``."""

    status = 2

    def __init__(self, code: UserErrorCode, message: str) -> None:
        super().__init__(
            code, message
        )  # both, because a process pool makes the error again from its arguments
        self.code = code

    def __str__(self) -> str:
        return str(self.args[1])


class NumericalError(CommandError):
    """A loss or gradient that is not finite and is not an fp16 overflow."""

    status = 3
    code = "not-finite"


class OverflowAtLowestScale(NumericalError):
    """fp16 gradients overflow at a loss scale that does not fall any further."""

    code = "fp16-overflow"

    def __init__(self, scale: float) -> None:
        super().__init__(
            f"the gradients overflow fp16 at a loss scale of {scale:g}, which does not fall any further; go on from "
            "the newest checkpoint (--resume) with a lower learning rate, or start anew in bf16 or fp32"
        )


class LostRankError(CommandError):
    """A rank has died or does not answer."""

    status = 4
    code = "lost-rank"


class StoppedError(CommandError):
    """The job was told to stop, and has saved a checkpoint."""

    status = 75  # EX_TEMPFAIL of sysexits.h: to be tried again
    code = "stopped"
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


def show_error(error: CommandError) -> None:
    """The one line of an error, which may be said by any rank and from any thread."""
    rank = environment_rank()
    line = f"{error.label}: {' '.join(str(error).split())} [{error.code}]"
    if rank:
        line = f"\n{line} (rank {rank})"  # rank 0's progress bar stands in the last line
    print(line, file=sys.stderr, flush=True)


def environment_rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0
