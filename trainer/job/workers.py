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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from distilspeed.trainer.job.processes import children_deaf_to

P = ParamSpec("P")
R = TypeVar("R")

# A terminal sends these to the parent and the workers. The parent ends its workers, with SIGTERM if they hang.
LEFT_TO_PARENT = (signal.SIGINT, signal.SIGHUP)


@dataclass
class _Worker:
    """A process, this process's end of its pipe, and its first function until that is sent."""

    process: BaseProcess
    connection: Connection
    start: Callable[[], None] | None


class WorkerPool:
    """Processes that run functions, each one at a time. A future raises ``BrokenProcessPool`` if its process died.

    At the end of a ``with`` block waiting functions are cancelled and running ones are awaited. If an exception ends
    the block, the processes are terminated.

    Each process has a pipe of its own, which ends when the process dies, even halfway through a result. Python's
    ``ProcessPoolExecutor`` has one pipe for the results of all, and then waits for the rest of that result forever.
    """

    def __init__(self, starts: Sequence[Callable[[], None]]) -> None:
        """Make a pool of a process for each function of ``starts``; the process begins with this function.

        The processes are started as functions are submitted.
        """
        self._starts = list(starts)
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(len(starts))

    def submit(self, function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> Future[R]:
        if self._starts:
            self._start_worker()
        return self._threads.submit(self._run, function, arguments, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._terminate()
        try:
            self._threads.shutdown(wait=True, cancel_futures=True)
            for worker in self._workers:
                worker.connection.close()  # so the process ends
            for worker in self._workers:
                worker.process.join()
        except BaseException:  # Ctrl-C while it waits
            self._terminate()
            raise

    def _start_worker(self) -> None:
        # Spawn, because forking while threads run (tokenizers, Arrow, a hub download) can deadlock.
        context = multiprocessing.get_context("spawn")
        connection, of_worker = context.Pipe()
        with children_deaf_to(LEFT_TO_PARENT):
            process = context.Process(target=_work, args=(of_worker,))
            process.start()
            of_worker.close()  # so only the process holds this end
            self._workers.append(_Worker(process, connection, self._starts.pop(0)))
        self._idle.put(self._workers[-1])

    def _terminate(self) -> None:
        for worker in self._workers:
            worker.process.terminate()

    def _run(self, *task: Any) -> Any:
        worker = self._idle.get()
        try:
            if worker.start is not None:
                # Sent here, because starting a process waits until the process has read its arguments.
                worker.connection.send(worker.start)
                worker.start = None
            worker.connection.send(task)
            result, error = worker.connection.recv()
        except (EOFError, OSError) as ended:
            raise BrokenProcessPool("a worker process died") from ended
        finally:
            self._idle.put(worker)
        if error is not None:
            raise error
        return result


def _work(connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    failure: memoryview | None = None
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe
        start = connection.recv_bytes()
        try:
            pickle.loads(start)()
        except Exception as error:
            failure = _pickled(error)
        while True:
            task = connection.recv_bytes()
            connection.send_bytes(_answer(task) if failure is None else failure)


def _answer(task: bytes) -> memoryview:
    """Run the pickled task; return the pickled result and error."""
    try:
        function, arguments, options = pickle.loads(task)
        return ForkingPickler.dumps((function(*arguments, **options), None))
    except Exception as error:
        return _pickled(error)


def _pickled(error: Exception) -> memoryview:
    """Return the pickled answer that says what the running handler has caught."""
    note = f"in a worker process:\n{traceback.format_exc()}"  # tracebacks are not pickled
    try:
        error.add_note(note)
        answer = ForkingPickler.dumps((None, error))
        pickle.loads(answer)  # some errors can be pickled, but not read again
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note(note)
        answer = ForkingPickler.dumps((None, plain))
    return answer


def _end_with_parent() -> None:
    # A worker in the middle of a function would outlive a killed parent.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
