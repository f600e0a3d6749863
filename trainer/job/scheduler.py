"""Set torch's launcher variables for a rank that srun or mpirun started. This module has only fast imports."""

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from distilspeed.trainer.errors import UserError

LOOPBACK = "127.0.0.1"
# Below the ports that Linux uses for outgoing connections.
FIRST_PORT, PORTS = 15000, 15000
PORTS_BETWEEN_STEPS = 1009  # so that steps of consecutive jobs on one node use different ports


class _Names(NamedTuple):
    """The variables in which one kind of mpirun passes rank and world size."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = _Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # of MPICH and Intel MPI
_PALS = _Names("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE")  # of Cray


def take_place_from_scheduler() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT from srun's or mpirun's variables.

    Variables that are set already do not change. If RANK or WORLD_SIZE is set, another launcher started the rank, and
    this does nothing.

    Raises:
        UserError: the variables of srun or mpirun are incomplete or inconsistent.
    """
    given = os.environ
    if {"RANK", "WORLD_SIZE"} & given.keys():
        return
    # Check mpirun first: on a cluster it starts its helpers with srun, and its ranks inherit srun's variables.
    kind = next((kind for kind in (_OPEN_MPI, _HYDRA, _PALS) if kind.local_rank in given), None)
    if kind:
        place = _place_under_mpirun(kind, given)
    # Only srun sets SLURM_STEP_NUM_TASKS. Without it this process is a batch script or a shell in an allocation, not a
    # rank. A process with SLURM_PTY_PORT is a shell that srun started.
    elif "SLURM_STEP_NUM_TASKS" in given and "SLURM_PTY_PORT" not in given:
        place = _place_under_srun(given)
    else:
        return
    for name, value in place.items():
        os.environ.setdefault(name, str(value))


def _place_under_mpirun(names: _Names, given: Mapping[str, str]) -> dict[str, object]:
    place = _place(names.rank, names.size, names.local_rank, given)
    if given.get(names.local_size) in (None, given[names.size]):
        job = given.get("PMIX_NAMESPACE") or given.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
        port = FIRST_PORT + zlib.crc32(job.encode()) % PORTS
        place |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    # Over several hosts no variable names the first host, so the user must set MASTER_ADDR.
    return place | ({"LOCAL_SIZE": given[names.local_size]} if names.local_size in given else {})


def _place_under_srun(given: Mapping[str, str]) -> dict[str, object]:
    place = _place("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", given)
    hosts = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST", "")
    if given.get("SLURM_STEP_NUM_NODES") == "1":
        place |= {"LOCAL_SIZE": place["WORLD_SIZE"], "MASTER_ADDR": LOOPBACK}
    elif hosts:
        place["MASTER_ADDR"] = first_host(hosts)
    if threads := given.get("SLURM_CPUS_PER_TASK"):
        place["OMP_NUM_THREADS"] = threads
    job, step = (_number(name, given) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return place | {"MASTER_PORT": FIRST_PORT + (job + step * PORTS_BETWEEN_STEPS) % PORTS}


def first_host(nodes: str) -> str:
    """Return the first host of a list in Slurm's notation: ``gpu03-a`` for ``gpu[03-05,07]-a,cpu1``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else nodes)


def _place(rank: str, size: str, local_rank: str, given: Mapping[str, str]) -> dict[str, object]:
    numbers = [_number(name, given) for name in (rank, size, local_rank)]
    if not numbers[2] <= numbers[0] < numbers[1]:
        raise UserError(
            "bad-ranks",
            f"{rank} is {numbers[0]}, {local_rank} is {numbers[2]} and {size} is {numbers[1]}, which is inconsistent; "
            "set RANK, LOCAL_RANK and WORLD_SIZE, or start the ranks with deepspeed",
        )
    return dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), numbers, strict=True))


def _number(name: str, given: Mapping[str, str]) -> int:
    value = given.get(name, "")
    if not value.isdecimal():
        raise UserError(
            "bad-ranks",
            f"{name} is {value!r}, but srun or mpirun must set it to a number; "
            "set RANK, LOCAL_RANK and WORLD_SIZE, or start the ranks with deepspeed",
        )
    return int(value)
