"""The ranks of a job: which one this process is, and how they find each other."""

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
    """One rank's place in the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def this_process() -> Process:
    """Read the launcher's environment; without one, this process is the whole job.

    Raises:
        UserError: what the environment says makes no sense.
    """
    take_place_from_scheduler()
    numbers = []
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        value = os.environ.get(name, default)
        if not value.isdecimal():
            raise UserError(
                "bad-ranks", f"{name} is {value!r}, which is no number; unset it, or set it as torchrun does"
            )
        numbers.append(int(value))
    rank, local_rank, world_size = numbers
    if not rank < world_size:
        raise UserError(
            "bad-ranks",
            f"RANK is {rank} and WORLD_SIZE {world_size}; unset them, or set them as torchrun does",
        )
    return Process(rank, local_rank, world_size, torch.device(get_accelerator().device_name(local_rank)))


@contextmanager
def joined_job(process: Process, timeout: float = 1800.0) -> Iterator[None]:
    """Be connected to the other ranks (in a job that has been joined already this does nothing).

    In the end the process groups are destroyed, because an interpreter that ends with them can abort. Not so after an
    error: it may be that another rank has gone, or waits for this one, and then that could take as long as a
    collective. The process ends without them, and without the interpreter's end, when all has been said.

    Args:
        timeout: of collectives, in seconds.

    Raises:
        UserError: the ranks cannot meet.
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
    """One that leaves first would break what the others are still at."""
    try:
        torch.distributed.barrier(device_ids=[process.local_rank] if process.device.type == "cuda" else None)
    except RuntimeError as error:
        raise LostRankError(
            f"a rank has died as the job ended ({first_line(error)}); where student/ is there the run is complete"
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
            f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{first_line(error)}; choose another port (deepspeed --master_port)",
        ) from error


def _check_meeting_place() -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                "bad-ranks",
                f"{os.environ['WORLD_SIZE']} ranks need {name}, which is not set; set MASTER_ADDR to the host of "
                "rank 0 and MASTER_PORT to a free port there, for all ranks, or start them with deepspeed or torchrun",
            )


def free_port() -> int:
    """A TCP port of this host that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _share_cores(process: Process) -> None:
    """Give each rank of this host cores of its own, unless the launcher has (--bind_cores_to_rank) or a person."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = sorted(os.sched_getaffinity(0))
    # DeepSpeed's launcher tells it by the first name, torchrun by the second.
    told = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    ranks_here = int(told or process.world_size)
    each = len(cores) // ranks_here
    if ranks_here > 1 and each:
        os.sched_setaffinity(0, cores[process.local_rank * each : (process.local_rank + 1) * each])
    torch.set_num_threads(max(1, each))


def _skip_compiling_shared_memory_collectives() -> None:
    # On CPUs DeepSpeed compiles this operator for minutes inside init_distributed; gloo serves without
    # it. The table of operators is a private name, so a DeepSpeed without it is left alone.
    operators = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(operators, dict) and "deepspeed_shm_comm" in operators:
        operators["deepspeed_shm_comm"] = False
