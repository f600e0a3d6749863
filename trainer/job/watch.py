"""Detect ranks that die, hang or fail, and agree on when to stop after a signal.

A thread in each rank keeps a connection to rank 0, separate from torch's, and sends a heartbeat every second. Every
rank therefore learns within a second that another rank died, even while its main thread waits. It learns after
``timeout`` seconds that a rank does not respond (because its process is stopped or its host is down). If a rank fails,
only that rank reports the error. SIGTERM, SIGINT, SIGHUP and the end of the ``deepspeed`` command reach the ranks at
different times, so the ranks agree at the end of each step whether it is the last.
"""

import contextlib
import json
import math
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError, connection
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed

from distilspeed.trainer.errors import CommandError, LostRankError, show_error, status_of
from distilspeed.trainer.job import parents
from distilspeed.trainer.job.processes import STOP_SIGNALS, end_at_once, stop_signals
from distilspeed.trainer.job.ranks import Process
from distilspeed.trainer.job.scheduler import LOOPBACK

SECONDS_BETWEEN_BEATS = 1.0
SECONDS_TO_HANG_UP = 5.0
SECONDS_TO_SPEAK = 3.0  # time for the reporting rank: when a rank exits, the launcher ends all others
STANDARD_STREAMS = (1, 2)

Message = dict[str, Any]


@dataclass
class _Member:
    """A rank, as seen by another rank."""

    rank: int
    host: str
    process: int
    last_heard: float = field(default_factory=time.monotonic)

    def silence(self) -> float:
        return time.monotonic() - self.last_heard

    def report(self, what: str) -> None:
        """Report what happened to this rank."""
        place = f"process {self.process} on {self.host}"
        if os.environ["RANK"] == "0":
            print(file=sys.stderr)  # start a new line after the progress bar
        show_error(
            LostRankError(
                f"rank {self.rank} ({place}) {what}; resume from the newest checkpoint with --resume"
            )
        )

    def kill(self) -> None:
        """Kill the rank if this process's launcher started it.

        A stopped process does not handle SIGTERM, and the launcher waits 30 seconds before it sends SIGKILL.
        """
        if self.host == socket.gethostname() and parents.is_sibling(self.process):
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)


class JobWatch:
    """Watches the job during the ``with`` block; entered by every rank's main thread, in ``joined_job``.

    Leaving the block waits for all ranks to leave it. An exception in the block ends all ranks: one rank raises it,
    and the others exit with its status and no message.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as lost.
    """

    def __init__(self, process: Process, timeout: float) -> None:
        self.process = process
        self.timeout = timeout
        self._told_by: str | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._may_leave = threading.Event()
        self._sending = threading.Lock()

    def __enter__(self) -> Self:
        here: Message = {"rank": self.process.rank, "host": socket.gethostname(), "process": os.getpid()}
        place: list[Any] = [None]
        if self.process.rank == 0:
            address = LOOPBACK if os.environ["MASTER_ADDR"] in (LOOPBACK, "localhost") else ""
            key = secrets.token_bytes(16)
            coordinator = _Coordinator((address, 0), key, self.process.world_size, self.timeout)
            coordinator.start()
            place = [(coordinator.port, key, here)]
        torch.distributed.broadcast_object_list(place, device=self.process.device)
        port, key, rank_0 = place[0]
        self._rank_0 = _Member(**rank_0)
        self._connection = connection.Client((os.environ["MASTER_ADDR"], port), authkey=key)
        self._send(here)
        # A data worker's copy would keep the connection open after this process has died.
        os.register_at_fork(after_in_child=self._connection.close)
        self._catch_signals()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if isinstance(error, CommandError):
                error.ranks_agree = True
            else:
                # If another rank died, a collective can fail here before the watch reports that rank.
                time.sleep(SECONDS_BETWEEN_BEATS)
            self._send({"kind": "failed", "status": status_of(error)})
            self._may_leave.wait(self.timeout)
            return  # keep the signal handlers, so that no signal interrupts the error handling
        self._send({"kind": "done"})
        self._may_leave.wait()
        os.close(signal.set_wakeup_fd(-1))
        self._signals.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def told_to_stop(self) -> str | None:
        """Return what tells the job to stop after this step, such as a signal's name; None to continue.

        All ranks get the same answer. Called by every rank at the end of each step; waits for all ranks.
        """
        self._send({"kind": "step", "told_by": self._told_by})
        return self._answers.get()

    def _send(self, message: Message) -> None:
        with self._sending, contextlib.suppress(OSError):  # if rank 0 is gone, the thread ends this process
            self._connection.send_bytes(json.dumps(message).encode())

    def _catch_signals(self) -> None:
        """Let the thread read signals: Python runs its handlers only after the main thread leaves a collective."""
        self._signals, written_to = socket.socketpair()
        written_to.setblocking(False)
        self._on_terminal = [stream for stream in STANDARD_STREAMS if os.isatty(stream)]
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in stop_signals()}
        signal.set_wakeup_fd(written_to.detach(), warn_on_full_buffer=False)

    def _run(self) -> None:
        sources: list[Any] = [self._connection, self._signals]
        if parents.runner is not None:
            sources.append(parents.runner)
        beat_at = 0.0
        while True:
            ready = connection.wait(sources, SECONDS_BETWEEN_BEATS)
            if self._signals in ready:
                for number in self._signals.recv(64):
                    if number in STOP_SIGNALS:
                        self._note_end(signal.Signals(number).name)
            if parents.runner in ready:
                self._note_end("the end of the deepspeed command")
                sources.remove(parents.runner)
            if self._connection in ready:
                self._rank_0.last_heard = time.monotonic()
                try:
                    message = json.loads(self._connection.recv_bytes())
                except (OSError, EOFError):
                    self._end_without_rank_0("died")
                if self._is_over(message):
                    return
            if time.monotonic() - beat_at >= SECONDS_BETWEEN_BEATS:
                self._send({"kind": "beat"})
                beat_at = time.monotonic()
            if self._rank_0.silence() > self.timeout:
                self._end_without_rank_0(f"has not responded for {self.timeout:g} seconds", kill=True)

    def _note_end(self, told_by: str) -> None:
        self._told_by = self._told_by or told_by
        for stream in self._on_terminal:
            if not os.isatty(
                stream
            ):  # the terminal is closed, and an error of writing to it would prevent the checkpoint
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)

    def _is_over(self, message: Message) -> bool:
        if message["kind"] == "step":
            self._answers.put(message["told_by"])
        elif message["kind"] == "leave":
            self._connection.close()
            if message["status"] and message["rank"] != self.process.rank:
                time.sleep(SECONDS_TO_SPEAK)
                end_at_once(message["status"])
            self._may_leave.set()
            return True
        return False

    def _end_without_rank_0(self, what: str, kill: bool = False) -> NoReturn:
        # One rank on rank 0's host reports it, and one on every other host, because rank 0's host may be down.
        if self.process.rank == 1 or self.process.local_rank == 0:
            self._rank_0.report(what)
            if kill:
                self._rank_0.kill()
        else:
            time.sleep(SECONDS_TO_SPEAK)
        end_at_once(LostRankError.status)


class _Coordinator:
    """Rank 0's end of the connections; rank 0 is a member, too."""

    def __init__(self, address: tuple[str, int], key: bytes, world_size: int, timeout: float) -> None:
        self.listener = connection.Listener(address, backlog=world_size, authkey=key)
        self.port: int = self.listener.address[1]
        self.world_size = world_size
        self.timeout = timeout
        self.members: dict[Any, _Member] = {}
        self.told_by: list[str | None] = []
        self.done = 0
        self.failed: dict[int, int] = {}
        self.decide_at = math.inf

    def start(self) -> None:
        os.register_at_fork(after_in_child=self._close)
        for name, run in (("accept", self._accept), ("coordinator", self._run)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def _close(self) -> None:
        for source in (self.listener, *self.members):
            source.close()

    def _accept(self) -> None:
        while len(self.members) < self.world_size:
            with contextlib.suppress(OSError, EOFError, AuthenticationError):  # not a rank of this job
                source = self.listener.accept()
                self.members[source] = _Member(**json.loads(source.recv_bytes()))
        self.listener.close()

    def _run(self) -> None:
        beat_at = 0.0
        while self.done < self.world_size:
            for member, message in self._receive():
                self._note(member, message)
            for member in list(self.members.values()):
                if member.silence() > self.timeout:
                    self._lose(member, f"has not responded for {self.timeout:g} seconds", kill=True)
            if self.failed and (0 in self.failed or time.monotonic() > self.decide_at):
                rank = min(self.failed)
                self._dismiss({"kind": "leave", "status": self.failed[rank], "rank": rank})
                return
            if time.monotonic() - beat_at >= SECONDS_BETWEEN_BEATS:
                self._tell(list(self.members), {"kind": "beat"})
                beat_at = time.monotonic()
        self._dismiss({"kind": "leave", "status": 0})

    def _receive(self) -> list[tuple[_Member, Message]]:
        received = []
        # Ranks that connect during the wait are read one beat later.
        for source in connection.wait(list(self.members), SECONDS_BETWEEN_BEATS):
            member = self.members[source]
            member.last_heard = time.monotonic()
            try:
                received.append((member, json.loads(source.recv_bytes())))  # type: ignore[union-attr]
            except (OSError, EOFError):
                self._lose(member, "died")
        return received

    def _note(self, member: _Member, message: Message) -> None:
        if message["kind"] == "step":
            self.told_by.append(message["told_by"])
            if len(self.told_by) == self.world_size:
                told_by = next(filter(None, self.told_by), None)
                self._tell(list(self.members), {"kind": "step", "told_by": told_by})
                self.told_by.clear()
        elif message["kind"] == "done":
            self.done += 1
        elif message["kind"] == "failed":
            self.failed[member.rank] = message["status"]
            # If all ranks fail, rank 0 reports the error, if it fails within a beat.
            self.decide_at = min(self.decide_at, time.monotonic() + SECONDS_BETWEEN_BEATS)

    def _lose(self, lost: _Member, what: str, kill: bool = False) -> NoReturn:
        lost.report(what)
        self._dismiss(
            {"kind": "leave", "status": LostRankError.status, "rank": lost.rank}, but={0, lost.rank}
        )
        if kill:
            lost.kill()
        end_at_once(LostRankError.status)

    def _dismiss(self, message: Message, but: Collection[int] = ()) -> None:
        """Tell the ranks to leave, this process last: if it exits, messages that others have not read are lost."""
        ranks = {member.rank: source for source, member in self.members.items() if member.rank not in but}
        own = ranks.pop(0, None)
        self._tell(ranks.values(), message)
        waiting = set(ranks.values())
        end = time.monotonic() + SECONDS_TO_HANG_UP
        while waiting and time.monotonic() < end:
            for source in connection.wait(waiting, SECONDS_BETWEEN_BEATS):
                try:
                    source.recv_bytes()  # type: ignore[union-attr]
                except (OSError, EOFError):
                    waiting.remove(source)
        if own:
            self._tell([own], message)

    def _tell(self, members: Iterable[Any], message: Message) -> None:
        for member in members:
            with contextlib.suppress(OSError):  # reading from this member will find the failure
                member.send_bytes(json.dumps(message).encode())
