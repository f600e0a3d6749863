"""Jobs run in worker processes, one at a time on each device."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from distilspeed.trainer.errors import NumericalError, UserError
from distilspeed.trainer.evaluation.device_jobs import jobs_at_a_time, run_jobs

CPU = torch.device("cpu")


def where(device: torch.device, number: int) -> tuple[int, int, int, str]:
    time.sleep(0.2)
    return number, os.getpid(), torch.get_num_threads(), device.type


def meet(device: torch.device, folder: Path, number: int) -> bool:
    """Return True when all three jobs are running at the same time."""
    (folder / str(number)).touch()
    while len(list(folder.iterdir())) < 3:
        time.sleep(0.01)
    return True


def fail(device: torch.device, error: Exception) -> None:
    raise error


def die(device: torch.device) -> None:
    os._exit(1)


def test_several_run_at_a_time_in_processes_that_share_the_threads(tmp_path: Path) -> None:
    jobs = {number: partial(meet, folder=tmp_path, number=number) for number in range(3)}
    assert dict(run_jobs(jobs, CPU, 3)) == dict.fromkeys(range(3), True)
    found = dict(run_jobs({number: partial(where, number=number) for number in range(5)}, CPU, 2))
    assert [found[number][0] for number in range(5)] == list(range(5))
    processes = {process for _, process, *_ in found.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {tuple(rest) for _, _, *rest in found.values()} == {(max(1, torch.get_num_threads() // 2), "cpu")}


def test_one_at_a_time_runs_here_in_order() -> None:
    results = list(run_jobs({number: partial(where, number=number) for number in (2, 0, 1)}, CPU, 1))
    assert [key for key, _ in results] == [2, 0, 1]
    assert {process for _, (_, process, *_) in results} == {os.getpid()}


@pytest.mark.parametrize(
    "error", [NumericalError("the loss is nan"), UserError("bad-task", "no label; add one")]
)
def test_an_error_of_a_job_is_raised_here_and_ends_the_others(error: Exception, tmp_path: Path) -> None:
    jobs = {"waits for ever": partial(meet, folder=tmp_path, number=0), "fails": partial(fail, error=error)}
    with pytest.raises(type(error), match=str(error)):
        dict(run_jobs(jobs, CPU, 2))


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    jobs = {"waits for ever": partial(meet, folder=tmp_path, number=0), "dies": die}
    with pytest.raises(UserError, match="fine-tuning process died") as raised:
        dict(run_jobs(jobs, CPU, 2))
    assert raised.value.code == "out-of-memory"


def test_the_number_of_gpus_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cuda = torch.device("cuda")
    assert [jobs_at_a_time(given, cuda) for given in (None, 1, 2)] == [2, 1, 2]
    assert [jobs_at_a_time(given, CPU) for given in (None, 3)] == [1, 3]
    with pytest.raises(UserError, match=r"--num_gpus is 3, and PyTorch finds 2; give at most 2") as raised:
        jobs_at_a_time(3, cuda)
    assert raised.value.code == "no-gpu"


STOPPED = """
import sys
from functools import partial
from pathlib import Path
import torch
from test_device_jobs import meet
from distilspeed.trainer.evaluation.device_jobs import run_jobs

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dict(run_jobs({number: partial(meet, folder=folder, number=number) for number in range(2)}, torch.device("cpu"), 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_leaves_no_process_and_no_message(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "running").mkdir()
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "JOB_OF_TEST": str(tmp_path)}
    command = [sys.executable, script, tmp_path / "running"]
    deadline = time.monotonic() + 600
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while len(list((tmp_path / "running").iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert "leaked" not in errors
    while any(str(tmp_path) in environment_of(path) for path in Path("/proc").glob("[0-9]*/environ")):
        assert time.monotonic() < deadline, "a process is still running"
        time.sleep(0.05)


def environment_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # of another user, or ended
        return ""
