"""Run jobs such as fine-tunings in worker processes: on every GPU, one job at a time."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.command import quiet_libraries
from distilspeed.trainer.job.processes import exit_on_sigterm
from distilspeed.trainer.job.workers import WorkerPool

Key = TypeVar("Key")
Result = TypeVar("Result")


def choose_device(name: str) -> torch.device:
    """Return the device; ``auto`` is the GPU if there is one. Raise ``UserError`` for ``cuda`` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no-gpu", "--device cuda needs a GPU, and PyTorch finds none; use --device cpu")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")


def jobs_at_a_time(num_gpus: int | None, device: torch.device) -> int:
    """Return how many jobs run at a time: ``num_gpus``, or by default one on every GPU, and one on a CPU.

    Raises:
        UserError: there are fewer GPUs.
    """
    if device.type == "cpu":
        return num_gpus or 1
    found = torch.cuda.device_count()
    if num_gpus is not None and num_gpus > found:
        raise UserError(
            "no-gpu", f"--num_gpus is {num_gpus}, and PyTorch finds {found}; give at most {found}"
        )
    return num_gpus or found


def run_jobs(
    jobs: Mapping[Key, Callable[[torch.device], Result]], device: torch.device, at_a_time: int
) -> Iterator[tuple[Key, Result]]:
    """Yield every job's key and result as it finishes.

    A single job at a time runs in this process, in order. Several run in as many processes: each has one GPU, or its
    share of the CPU's threads. Jobs are then pickled, and finish in any order.

    Raises:
        UserError: a process died.
    """
    at_a_time = min(at_a_time, len(jobs))
    if at_a_time <= 1:
        yield from ((key, job(device)) for key, job in jobs.items())
        return
    devices = multiprocessing.get_context("spawn").SimpleQueue()
    for number in range(at_a_time):
        devices.put("cpu" if device.type == "cpu" else f"cuda:{number}")
    threads = max(1, torch.get_num_threads() // at_a_time)
    try:
        with exit_on_sigterm(), WorkerPool(at_a_time, _start_worker, devices, threads) as pool:
            # These start all processes. The pool does not notice the death of a process that it started with its last
            # job: it looks for new ones only when it gets another job or a result.
            for _ in range(at_a_time):
                pool.submit(_nothing)
            futures = {pool.submit(_run_in_worker, job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "out-of-memory", "a fine-tuning process died, probably out of memory; try a smaller --num_gpus"
        ) from error


# A worker process keeps its device here: an executor has no other place for per-worker state.
_device: torch.device


def _start_worker(devices: Any, threads: int) -> None:
    global _device
    _device = torch.device(devices.get())
    if _device.type == "cuda":
        torch.cuda.set_device(_device)
    torch.set_num_threads(threads)
    quiet_libraries()


def _nothing() -> None:
    pass


def _run_in_worker(job: Callable[[torch.device], Result]) -> Result:
    return job(_device)
