"""Stop signals, child processes that ignore them, and immediate exit."""

import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

# Ctrl-C, a closed terminal and batch systems send these to every process of a job.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop this command; under nohup SIGHUP is ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (is_ignored and number == signal.SIGHUP))


@contextmanager
def children_deaf_to(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Block these signals in processes that the block starts; this process handles its stop signals after the block.

    A new process inherits the blocked signals of the thread that starts it. If it ignored them by itself, a signal
    could arrive while its interpreter starts, which prints a traceback. If this process left the block half-way, the
    new process would print an error about incomplete input.
    """
    held: list[int] = []
    handlers = {}
    if (
        threading.current_thread() is threading.main_thread()
    ):  # Python runs signal handlers only in the main thread
        handlers = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number))}
        for number in handlers:
            signal.signal(number, lambda number, _: held.append(number))
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    # multiprocessing starts its resource tracker on first use and then unblocks signals. Start it now, and block the
    # signals again.
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


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit in the block when SIGTERM comes, so that the block can end what it has started."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_at_once(status: int) -> NoReturn:
    """Exit without the interpreter's shutdown, which can hang or abort after another process has died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
