"""End this rank when the processes that started it end. Linux only; this module has only fast imports.

The ``deepspeed`` command starts DeepSpeed's launcher, and the launcher starts the ranks. If either is killed, its
children keep running, and the ranks could train for days. A rank that a shell or Slurm started is not tied to its
parent, because people log out of shells.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LAUNCHER = "deepspeed.launcher.launch"
_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
_INIT = 1  # adopts the children of a process that ended
_ENDED = 128 + signal.SIGTERM

# A pidfd of the ``deepspeed`` command, which becomes readable when the command ends. None if there is no such command.
runner: int | None = None


def end_with_launcher(was_launched: bool) -> None:
    """Send SIGTERM to this rank when the launcher ends; exit if the launcher or ``deepspeed`` has already ended.

    Args:
        was_launched: whether a launcher made the command line.
    """
    global runner
    launcher = os.getppid()
    command = _command(launcher)
    if _LAUNCHER not in command:
        if was_launched and launcher == _INIT:
            sys.exit(_ENDED)
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = _parent(launcher)
    if _is_runner(parent):
        try:
            runner = os.pidfd_open(parent)
        except ProcessLookupError:
            sys.exit(_ENDED)
        except (AttributeError, OSError):  # without pidfds `deepspeed` is not watched
            runner = None
    # `deepspeed` passes this option to its launcher; on other hosts it also passes --node_rank.
    elif parent == _INIT and "--enable_each_rank_log" in str(command) and "--node_rank" not in str(command):
        sys.exit(_ENDED)
    if os.getppid() != launcher:
        sys.exit(_ENDED)


def is_sibling(process: int) -> bool:
    """Return whether ``process`` has the same parent as this process."""
    try:
        return os.getppid() != _INIT and _parent(process) == os.getppid()
    except OSError:
        return False


def _is_runner(process: int) -> bool:
    # The command line starts with the program, or with an interpreter, its options and the script or module.
    return any(Path(part).name in _RUNNERS for part in _command(process)[:4])


def _command(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(process: int) -> int:
    # State and parent follow the name, which is in parentheses and may contain any character.
    return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
