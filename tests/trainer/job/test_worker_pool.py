"""The worker processes of a command: what they return, how they fail and how they end."""

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.workers import WorkerPool

PATIENCE = 600.0  # seconds until a test gives up waiting


def nothing() -> None:
    pass


def fail() -> None:
    raise UserError("no-gpu", "no GPU; use --device cpu")


class NeedsTwo(Exception):
    """Pickled with one argument, so it cannot be read again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}, {second}")


def fail_unreadably() -> None:
    raise NeedsTwo("no", "GPU")


def return_a_lambda() -> Callable[[], None]:
    return lambda: None


def wait_for_ever(folder: Path, number: int) -> None:
    path = folder / str(number)
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
    time.sleep(PATIENCE)


def die_halfway_through_the_result() -> bytes:
    def send_half(connection: Connection, message: bytes) -> None:
        os.write(connection.fileno(), message[: len(message) // 2])
        os._exit(1)

    Connection._send = send_half  # type: ignore[attr-defined]
    return bytes(1000)


def test_a_process_that_dies_halfway_through_a_result_is_noticed() -> None:
    with WorkerPool([nothing]) as pool, pytest.raises(BrokenProcessPool):
        pool.submit(die_halfway_through_the_result).result(PATIENCE)


def test_an_error_ends_the_block_although_processes_have_work(tmp_path: Path) -> None:
    pids = []

    def work_until_an_error() -> None:
        with WorkerPool([nothing] * 2) as pool:
            for number in range(5):
                pool.submit(wait_for_ever, tmp_path, number)
            deadline = time.monotonic() + PATIENCE
            while len(list(tmp_path.glob("[0-9]"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            pids.extend(int(path.read_text()) for path in tmp_path.glob("[0-9]"))
            raise KeyError

    with pytest.raises(KeyError):
        work_until_an_error()
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_back_and_each_process_ends(count: int) -> None:
    with WorkerPool([nothing] * count) as pool:
        futures = [pool.submit(pow, number, 2, mod=1000) for number in range(10)]
        assert [future.result() for future in futures] == [number * number for number in range(10)]
        assert len(multiprocessing.active_children()) == count
    assert not multiprocessing.active_children()


def test_processes_start_as_they_are_needed() -> None:
    with WorkerPool([nothing] * 64) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
        assert len(multiprocessing.active_children()) == 1


def test_what_a_function_or_the_start_raises_is_raised_here() -> None:
    for starts, function in (([nothing], fail), ([fail], nothing)):
        with WorkerPool(starts) as pool:
            for _ in range(2):
                with pytest.raises(UserError, match="no GPU; use --device cpu") as raised:
                    pool.submit(function).result()
                assert raised.value.code == "no-gpu"
                assert "in fail\n" in raised.value.__notes__[0]


def test_an_error_that_cannot_be_unpickled_keeps_its_words() -> None:
    with WorkerPool([nothing]) as pool, pytest.raises(RuntimeError, match="NeedsTwo: no, GPU") as raised:
        pool.submit(fail_unreadably).result()
    assert "in fail_unreadably\n" in raised.value.__notes__[0]


def test_a_result_that_cannot_be_pickled_is_an_error_of_the_function() -> None:
    with WorkerPool([nothing]) as pool:
        with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
            pool.submit(return_a_lambda).result()
        assert pool.submit(os.getpid).result() != os.getpid()
