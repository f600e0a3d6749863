"""How the ranks of a job end: with the right status, and without other output."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ending_job import INTERPRETERS_END
from jobs import Job, cpu_environment, finish, kill, start
from launcher import free_port

JOB = Path(__file__).with_name("ending_job.py")


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Job]]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    environments = [cpu_environment(**place, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    command = [sys.executable, JOB, request.param]
    ranks = [start(command, environment, tmp_path) for environment in environments]
    yield ranks
    for rank in ranks:
        if rank.poll() is None:
            kill(rank)


@pytest.mark.parametrize("ranks", ["success"], indirect=True)
def test_ranks_agree_on_the_optimizer_that_all_can_build_and_end_cleanly(
    ranks: list[Job],
) -> None:
    (first, second) = [finish(rank) for rank in ranks]
    assert [(status, errors) for status, _, errors in (first, second)] == [
        (0, f"{INTERPRETERS_END}, in a job: False\n")
    ] * 2
    said, chosen = first[1].splitlines()
    assert said == "DeepSpeed's fused_adam cannot be built on rank 1, using torch's AdamW: no such compiler"
    assert json.loads(chosen) == json.loads(second[1]) == {"torch_adam": True, "fused": True}


@pytest.mark.parametrize("ranks", ["error"], indirect=True)
def test_an_error_of_one_rank_ends_all_ranks_with_its_status_and_line(
    ranks: list[Job],
) -> None:
    ends = [finish(rank) for rank in ranks]
    assert ends == [(3, "", ""), (3, "", "\nerror: no number [not-finite] (rank 1)\n")]


@pytest.mark.parametrize("ranks", ["fault"], indirect=True)
def test_a_failed_rank_does_not_wait_for_its_peer(
    ranks: list[Job],
) -> None:
    status, _, errors = finish(ranks[1])
    assert status == 1
    assert errors.endswith("ValueError: a fault\n"), errors
    assert INTERPRETERS_END not in errors  # the interpreter's end may abort if process groups are left
    assert ranks[0].poll() is None
