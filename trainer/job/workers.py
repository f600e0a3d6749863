"""Worker processes of a command. They leave stop signals to the command, and end with it."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from distilspeed.trainer.job.processes import children_deaf_to

P = ParamSpec("P")
R = TypeVar("R")

# A terminal sends these to the parent and the workers. The parent ends its workers, with SIGTERM if they hang.
LEFT_TO_PARENT = (signal.SIGINT, signal.SIGHUP)


class WorkerPool:
    """Processes that run functions, each one at a time. A future raises ``BrokenProcessPool`` if its process died.

    At the end of a ``with`` block waiting functions are cancelled and running ones are awaited. If an exception ends
    the block, the processes are terminated.

    Each process has a pipe of its own, which ends when the process dies, even halfway through a result. Python's
    ``ProcessPoolExecutor`` has one pipe for the results of all, and then waits for the rest of that result without end.
    """

    def __init__(self, starts: Sequence[Callable[[], None]]) -> None:
        """Start a process for each function of ``starts``; each begins with its function."""
        # Spawn, because forking while threads run (tokenizers, Arrow, a hub download) can deadlock.
        context = multiprocessing.get_context("spawn")
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._processes = []
        with children_deaf_to(LEFT_TO_PARENT):
            for start in starts:
                connection, of_worker = context.Pipe()
                # Python terminates a daemon at exit, should a signal come before the ``with`` block begins.
                process = context.Process(target=_work, args=(of_worker, start), daemon=True)
                process.start()
                of_worker.close()  # so that only the worker holds this end
                self._idle.put(connection)
                self._processes.append(process)
        self._threads = ThreadPoolExecutor(len(starts))

    def submit(self, function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> Future[R]:
        return self._threads.submit(self._run, function, arguments, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for process in self._processes:
                process.terminate()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().close()  # its worker ends
        for process in self._processes:
            process.join()

    def _run(self, *task: Any) -> Any:
        connection = self._idle.get()
        try:
            connection.send(task)
            result, error = connection.recv()
        except (EOFError, OSError) as ended:
            raise BrokenProcessPool("a worker process died") from ended
        finally:
            self._idle.put(connection)
        if error is not None:
            raise error
        return result


def _work(connection: Connection, start: Callable[[], None]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    failure = None
    try:
        start()
    except Exception as error:
        failure = error
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe
        while True:
            connection.send_bytes(_answer(connection.recv_bytes(), failure))


def _answer(task: bytes, failure: Exception | None) -> memoryview:
    """Run the pickled task, unless the process has failed at its start; return the pickled result and error."""
    try:
        if failure is not None:
            raise failure
        function, arguments, options = pickle.loads(task)
        return ForkingPickler.dumps((function(*arguments, **options), None))
    except Exception as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")  # tracebacks are not pickled
        return ForkingPickler.dumps((None, error))


def _end_with_parent() -> None:
    # A worker in the middle of a function would outlive a killed parent.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
