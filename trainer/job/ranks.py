"""The ranks of a job: which rank this process is, and how ranks join."""

import atexit
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from distilspeed.trainer.errors import LostRankError, UserError, first_line, status_of
from distilspeed.trainer.job.processes import end_at_once
from distilspeed.trainer.job.scheduler import take_place_from_scheduler


@dataclass(frozen=True)
class Process:
    """This process's rank in the job, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def this_process() -> Process:
    """Read the rank from the launcher's environment variables; without them, this process is the whole job.

    Raises:
        UserError: the variables are inconsistent.
    """
    take_place_from_scheduler()
    numbers = []
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if not value.isdecimal():
            raise UserError(
                "bad-ranks", f"{name} is {value!r}, not a number; unset it, or set it as torchrun does"
            )
        numbers.append(int(value))
    rank, local_rank, world_size = numbers
    if not rank < world_size:
        raise UserError(
            "bad-ranks",
            f"RANK is {rank}, but WORLD_SIZE is {world_size}; unset them, or set them as torchrun does",
        )
    return Process(rank, local_rank, world_size, torch.device(get_accelerator().device_name(local_rank)))


@contextmanager
def joined_job(process: Process, timeout: float = 1800.0) -> Iterator[None]:
    """Connect to the other ranks for the duration of the block; does nothing if they are connected already.

    After the block the process groups are destroyed, because the interpreter can abort if it exits with them. After
    an error they are not: another rank may be dead or may wait for this one, and destroying the groups could then
    take as long as a collective's timeout. The process exits without the interpreter's shutdown instead, after it
    has reported the error.

    Args:
        timeout: timeout of collectives, in seconds.

    Raises:
        UserError: the ranks cannot connect.
    """
    if torch.distributed.is_initialized():
        yield
        return
    _join(process, timeout)
    errors: list[BaseException] = []
    atexit.register(lambda: errors and end_at_once(status_of(errors[0])))
    try:
        yield
        _wait_for_all(process)
    except BaseException as error:
        errors.append(error)
        raise
    deepspeed.comm.destroy_process_group()


def _wait_for_all(process: Process) -> None:
    """Wait for all ranks, because a rank that leaves early would break the others' last collectives."""
    try:
        torch.distributed.barrier(device_ids=[process.local_rank] if process.device.type == "cuda" else None)
    except RuntimeError as error:
        raise LostRankError(
            f"a rank died as the job ended ({first_line(error)}); the run is complete if student/ exists"
        ) from error


def _join(process: Process, timeout: float = 1800.0) -> None:
    if process.world_size > 1:
        _check_meeting_place()
    alone = {
        "RANK": process.rank,
        "LOCAL_RANK": process.local_rank,
        "WORLD_SIZE": process.world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    if process.device.type == "cpu":
        _share_cores(process)
        _skip_compiling_shared_memory_collectives()
    get_accelerator().set_device(process.local_rank)
    try:
        deepspeed.init_distributed(
            auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout)
        )
    except torch.distributed.DistError as error:
        raise UserError(
            "bad-ranks",
            f"the ranks cannot connect at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{first_line(error)}; choose another port (deepspeed --master_port)",
        ) from error


def _check_meeting_place() -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                "bad-ranks",
                f"{os.environ['WORLD_SIZE']} ranks need {name}, which is not set; on all ranks, set MASTER_ADDR to "
                "rank 0's host and MASTER_PORT to a free port there, or start the ranks with deepspeed or torchrun",
            )


def free_port() -> int:
    """Return a TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _share_cores(process: Process) -> None:
    """Give each rank of this host its own cores, unless OMP_NUM_THREADS is set (by a launcher or the user)."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    # DeepSpeed's launcher sets the first variable, torchrun the second.
    told = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    ranks_here = int(told or process.world_size)
    each = len(cores) // ranks_here
    if ranks_here > 1 and each:
        os.sched_setaffinity(0, cores[process.local_rank * each : (process.local_rank + 1) * each])
    torch.set_num_threads(max(1, each))


def _skip_compiling_shared_memory_collectives() -> None:
    # On CPUs DeepSpeed compiles this operator inside init_distributed, which takes minutes; gloo works without it. The
    # table of operators is private, so do nothing if it does not exist.
    operators = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(operators, dict) and "deepspeed_shm_comm" in operators:
        operators["deepspeed_shm_comm"] = False
