"""The processes that started this rank: when they go, so does the rank. Linux; imports nothing that takes time.

``deepspeed`` starts DeepSpeed's launcher, and that one the ranks. Killed, neither takes down what it started, and the
ranks would train on for days. A rank that was started by a shell or by Slurm is not tied to its parent: people log out
of shells.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl's, in linux/prctl.h
_LAUNCHER = "deepspeed.launcher.launch"
_RUNNERS = ("deepspeed", "ds")

# A pidfd of the ``deepspeed`` command: can be read when that process has ended. None where there is none.
runner: int | None = None


def end_with_launcher(was_launched: bool) -> None:
    """Have SIGTERM sent to this rank at the launcher's end; exit where launcher or ``deepspeed`` has ended already.

    Args:
        was_launched: the command line is a launcher's.
    """
    global runner
    launcher = os.getppid()
    command = _command(launcher)
    if _LAUNCHER not in command or not hasattr(os, "pidfd_open"):
        if was_launched and launcher == 1:  # it has ended, and init has taken this process over
            sys.exit(128 + signal.SIGTERM)
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # `deepspeed` always gives this option; where it is missing, the launcher was started without it.
    if any(part.startswith("--enable_each_rank_log=") for part in command):
        runner = _open(_parent(launcher), _RUNNERS)
        if runner is None:
            sys.exit(128 + signal.SIGTERM)
    if os.getppid() != launcher:
        sys.exit(128 + signal.SIGTERM)


def is_sibling(process: int) -> bool:
    """Whether ``process`` was started by the process that started this one."""
    try:
        return _parent(process) == os.getppid()
    except OSError:
        return False


def _open(process: int, names: tuple[str, ...]) -> int | None:
    """A pidfd of ``process`` if it is a program of one of these names."""
    try:
        descriptor = os.pidfd_open(process)
    except OSError:
        return None
    # The program, or the interpreter and its script. Read after opening: the number is that process's until then.
    if any(Path(part).name in names for part in _command(process)[:2]):
        return descriptor
    os.close(descriptor)
    return None


def _command(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(process: int) -> int:
    # Behind the name, which is in brackets and may hold anything: state, parent.
    return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
