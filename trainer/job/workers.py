"""Worker processes of a command. They leave stop signals to the command, and end with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from distilspeed.trainer.job.processes import children_deaf_to

P = ParamSpec("P")
R = TypeVar("R")

# A terminal sends these to the parent and the workers. The parent ends its workers, with SIGTERM if they hang.
LEFT_TO_PARENT = (signal.SIGINT, signal.SIGHUP)


class WorkerPool:
    """Processes that run functions; ``submit`` raises ``BrokenProcessPool`` in its future if a process dies.

    At the end of a ``with`` block waiting functions are cancelled and running ones are awaited. If an exception ends
    the block, all child processes of this process are terminated.
    """

    def __init__(self, count: int, start: Callable[..., None], *arguments: Any) -> None:
        """Make a pool; each of the ``count`` processes begins with ``start(*arguments)``."""
        # Spawn, because forking while threads run (tokenizers, Arrow, a hub download) can deadlock.
        with children_deaf_to(LEFT_TO_PARENT):
            self._executor = ProcessPoolExecutor(
                count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(start, arguments),
            )

    def submit(self, function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> Future[R]:
        with children_deaf_to(LEFT_TO_PARENT):  # the pool starts its processes on demand
            return self._executor.submit(function, *arguments, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for process in multiprocessing.active_children():
                process.terminate()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _begin(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)


def _end_with_parent() -> None:
    # A worker waits for tasks on a pipe whose other end it also holds, so it would outlive a killed parent.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
