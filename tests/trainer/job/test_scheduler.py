"""A rank that srun or mpirun started gets rank and world size; a shell in an allocation is not treated as a rank."""

import os

import pytest
import torch
from user_errors import raises_user_error

from distilspeed.trainer.job.ranks import Process, _share_cores, joined_job, this_process
from distilspeed.trainer.job.scheduler import first_host, take_place_from_scheduler

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_CPUS_PER_TASK": "6",
}
ALLOCATION = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "7",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
PORT_OF_7 = str(15000 + 1790921346 % 15000)  # the CRC-32 of "7"


def place(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> dict[str, str]:
    """Return the variables that are added to an environment."""
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    take_place_from_scheduler()
    return {name: value for name, value in environment.items() if name not in given}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            STEP,
            {
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "MASTER_ADDR": "gpu07",
                "MASTER_PORT": str(15000 + 41 + 2 * 1009),
                "OMP_NUM_THREADS": "6",
            },
        ),
        (
            OPEN_MPI,
            {
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "LOCAL_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": PORT_OF_7,
            },
        ),
        (HYDRA, {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}),
    ],
)
def test_a_rank_takes_rank_and_world_size_from_the_scheduler(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place(monkeypatch, given) == expected
    # srun started mpirun's helper on this host, not the rank.
    helper = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    if given is not STEP:
        assert place(monkeypatch, helper | given) == expected


def test_ranks_of_a_single_host_connect_over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(monkeypatch, STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"})
    assert (found["MASTER_ADDR"], found["LOCAL_SIZE"]) == ("127.0.0.1", "4")


@pytest.mark.parametrize(
    "given",
    [
        {},
        ALLOCATION,  # sbatch and salloc without srun
        STEP | {"SLURM_PTY_PORT": "40000"},  # srun --pty bash
        STEP | {"RANK": "0", "WORLD_SIZE": "2"},  # torchrun or deepspeed on each node
        OPEN_MPI | {"WORLD_SIZE": "8"},  # a plan for other machines
    ],
)
def test_a_process_that_is_not_a_rank_of_srun_or_mpirun_is_not_changed(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place(monkeypatch, given) == {}


def test_variables_set_by_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(
        monkeypatch, STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    )
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (STEP | {"SLURM_PROCID": "4"}, ("SLURM_PROCID", "4")),
        (STEP | {"SLURM_STEP_ID": ""}, ("SLURM_STEP_ID", "''")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "two"}, ("OMPI_COMM_WORLD_SIZE", "'two'")),
        (
            {name: value for name, value in STEP.items() if name != "SLURM_LOCALID"},
            ("SLURM_LOCALID", "''"),
        ),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ("RANK", "WORLD_SIZE", "2")),
        ({"RANK": "one"}, ("RANK", "'one'")),
    ],
)
def test_inconsistent_variables_are_refused(
    given: dict[str, str], named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    with raises_user_error("bad-ranks", *named):
        this_process()


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_ranks_without_an_address_fail_at_once(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    monkeypatch.setattr(os, "environ", {name: value for name, value in given.items() if name != missing})
    process: Process = this_process()
    with raises_user_error("bad-ranks", f"2 ranks need {missing}"), joined_job(process):
        pass


@pytest.mark.parametrize(
    ("given", "cores", "threads"),
    [
        ({"LOCAL_SIZE": "2"}, [2, 3], 2),  # deepspeed
        ({"LOCAL_WORLD_SIZE": "2"}, [2, 3], 2),  # torchrun on each of two hosts
        ({}, [1], 1),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "4"}, None, None),
    ],
)
def test_ranks_of_a_host_share_its_cores(
    given: dict[str, str], cores: list[int] | None, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, object] = {"cores": None, "threads": None}
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: shared.update(cores=cores))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: shared.update(threads=number))
    _share_cores(Process(rank=3, local_rank=1, world_size=4, device=torch.device("cpu")))
    assert shared == {"cores": cores, "threads": threads}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,07]-a,cpu1", "gpu03-a"),
        ("r[1-2]n[010,012],x", "r1n010"),
        ("a-b.example[9]", "a-b.example9"),
    ],
)
def test_the_first_host_of_slurms_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
