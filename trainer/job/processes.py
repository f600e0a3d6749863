"""The end of a process, the signals that bring it about, and the processes that it starts: they leave these to it."""

import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import NoReturn

# Ctrl-C, a closed terminal and batch systems send these to every process of a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that end this command: nohup asks it to ignore that its terminal is closed."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (is_ignored and number == signal.SIGHUP))


@contextmanager
def children_deaf_to(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Processes that the block starts never get these signals; this one handles all stop signals after the block.

    A new process inherits the blocked signals of the thread that starts it. Had it to ignore them by itself, it would
    be too late: a signal meets an interpreter that is starting, which prints a traceback. And were this process to
    leave the block half-way, the new one would print that it was given only half of what it is to do.
    """
    held: list[int] = []
    handlers = {}
    if (
        threading.current_thread() is threading.main_thread()
    ):  # handlers run in it, whichever thread got the signal
        handlers = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number))}
        for number in handlers:
            signal.signal(number, lambda number, _: held.append(number))
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    # A helper of multiprocessing, which starts it when it is needed first, and then unblocks what we have blocked.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for held_number in held:
            signal.raise_signal(held_number)


def end_at_once(status: int) -> NoReturn:
    """End without the interpreter's own end, which can wait for, or abort over, what another process has left."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
