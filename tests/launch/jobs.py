"""One small training for all launch scripts, and helpers to start and observe it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import training_flags
from safetensors.torch import load_file

# Long enough that a kill after the first checkpoint comes before the end: 4 seconds on 2 idle cores.
STEPS, SAVE_STEPS, BATCH, MICRO_BATCH = 12, 2, 256, 16
MEASURED = ("time", "tokens_per_s", "mfu")
SECONDS = 1200  # a machine with other work may be ten times slower than an idle one

Job = subprocess.Popen[str]


def training(teacher: Path, corpus: Path, output: Path) -> list[str]:
    """Return arguments for launch/train.py on the CPU."""
    flags = training_flags(
        teacher,
        corpus,
        output,
        max_steps=STEPS,
        train_batch_size=BATCH,
        per_device_train_batch_size=MICRO_BATCH,
        save_steps=SAVE_STEPS,
    )
    return [str(part) for part in flags]


def cpu_environment(**more: object) -> dict[str, str]:
    # One thread per rank everywhere: another number of threads rounds sums differently.
    fixed = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, **{name: str(value) for name, value in more.items()}}


def start(command: list[object], environment: dict[str, str], folder: Path) -> Job:
    """Start a command in its own process group, as a shell does."""
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        cwd=folder,
        start_new_session=True,
    )


def finish(job: Job) -> tuple[int, str, str]:
    """Wait for the end; return exit status, standard output and standard error."""
    try:
        output, errors = job.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        kill(job)
        raise
    return job.returncode, output, errors


def kill(job: Job) -> None:
    """Send SIGKILL to the command and all its processes on this machine."""
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def wait_until(condition: Callable[[], bool], job: Job | None = None, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if job is not None and job.poll() is not None:
            raise AssertionError(f"ended with {job.returncode} too early: {job.communicate()[1][-3000:]}")
        assert time.monotonic() < end, f"no success within {seconds} seconds"
        time.sleep(0.05)


def wait_for_checkpoint(run: Path, job: Job) -> None:
    wait_until((run / "checkpoints" / "latest").is_file, job)


def processes_naming(text: object) -> Iterator[Path]:
    """Yield the /proc folders of the processes with the text in their command lines."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if str(text).encode() in command:
            yield folder


def works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").resolve() == folder
    except OSError:  # ended meanwhile
        return False


def assert_same_end(run: Path, reference: Path) -> None:
    """Check that losses at every step and weights are bitwise equal."""
    assert _curve(run) == _curve(reference)
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (run, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def chosen(request: pytest.FixtureRequest, test: str, *names: str) -> set[tuple[Any, ...]]:
    """Return the values of these parameters in a test's selected cases, so that a fixture trains only for those."""
    return {
        tuple(item.callspec.params[name] for name in names)
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and item.originalname == test
    }


def was_interrupted(run: Path) -> bool:
    return (run / "checkpoints" / "latest").is_file() and not (run / "student").exists()


def _curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
