"""Run jobs such as fine-tunings in worker processes: on every GPU, one job at a time."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

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
    threads = max(1, torch.get_num_threads() // at_a_time)
    devices = [
        device if device.type == "cpu" else torch.device(device.type, number) for number in range(at_a_time)
    ]
    try:
        with (
            exit_on_sigterm(),
            WorkerPool([partial(_start_worker, each, threads) for each in devices]) as pool,
        ):
            futures = {pool.submit(_run_in_worker, job): key for key, job in jobs.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "out-of-memory", "a fine-tuning process died, probably out of memory; try a smaller --num_gpus"
        ) from error


# A worker process keeps its device here.
_device: torch.device


def _start_worker(device: torch.device, threads: int) -> None:
    global _device
    _device = device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)
    quiet_libraries()


def _run_in_worker(job: Callable[[torch.device], Result]) -> Result:
    return job(_device)
