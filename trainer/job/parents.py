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
_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")
_INIT = 1  # takes over the children of a process that ends
_ENDED = 128 + signal.SIGTERM

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
        except (AttributeError, OSError):  # a system that has none: `deepspeed` is not watched
            runner = None
    # `deepspeed` gives its launcher this option, on other hosts together with --node_rank.
    elif parent == _INIT and "--enable_each_rank_log" in str(command) and "--node_rank" not in str(command):
        sys.exit(_ENDED)
    if os.getppid() != launcher:
        sys.exit(_ENDED)


def is_sibling(process: int) -> bool:
    """Whether ``process`` was started by the process that started this one."""
    try:
        return os.getppid() != _INIT and _parent(process) == os.getppid()
    except OSError:
        return False


def _is_runner(process: int) -> bool:
    # The program, or an interpreter with its switches and the script or module.
    return any(Path(part).name in _RUNNERS for part in _command(process)[:4])


def _command(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _parent(process: int) -> int:
    # Behind the name, which is in brackets and may hold anything: state, parent.
    return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
