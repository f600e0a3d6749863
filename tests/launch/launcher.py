"""Start the project's commands as a user does, with the real ``deepspeed`` launcher; or the ranks of a job alone."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rank_server import run_ranks

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
CPU_CONFIG = ROOT / "ds_configs" / "cpu.json"
SECONDS = 1200  # a busy machine may be ten times slower than an idle one


def deepspeed(
    *arguments: object, ranks: int, seconds: float = SECONDS, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    """Run ``deepspeed --num_gpus RANKS ARGUMENTS`` and wait for it."""
    command = [DEEPSPEED, "--num_gpus", ranks, "--master_port", free_port(), *arguments]
    return _run(command, seconds, device)


def python(*arguments: object, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    """Run this Python with the arguments and wait for it."""
    return _run([sys.executable, *arguments], device=device)


def ranks_alone(
    *arguments: object, ranks: int, seconds: float = SECONDS, folder: Path = ROOT, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run a script and its arguments on CPU ranks without a launcher, which takes a third of the time.

    The ranks get the environment variables that DeepSpeed's launcher sets, and ``variables``.
    """
    job = {
        **environment(),
        **{name: str(value) for name, value in variables.items()},
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
    }
    each = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return run_ranks([str(part) for part in arguments], each, folder, seconds)


def train_all(
    folder: Path, runs: list[dict[str, Any]], ranks: int, seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Train with each set of arguments, in one job; see many_runs_job.py."""
    job = folder / "job.json"
    job.write_text(json.dumps(runs, default=str))
    result = ranks_alone(Path(__file__).with_name("many_runs_job.py"), job, ranks=ranks, seconds=seconds)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def error_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def training_options(teacher: Path, data_dir: Path, output_dir: Path, **more: object) -> dict[str, Any]:
    """Return the options of a small training: ``more`` adds to them by name, and replaces them."""
    return {
        "deepspeed_config": CPU_CONFIG,
        "teacher": teacher,
        "data_dir": data_dir,
        "output_dir": output_dir,
        "train_batch_size": 16,
        "per_device_train_batch_size": 4,
    } | more


def flags(options: Mapping[str, object]) -> list[object]:
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def training_flags(teacher: Path, data_dir: Path, output_dir: Path, **more: object) -> list[object]:
    """Return the flags of a small training; see :func:`training_options`."""
    return flags(training_options(teacher, data_dir, output_dir, **more))


def write_config(path: Path, changes: Mapping[str, Any], remove: tuple[str, ...] = ()) -> Path:
    """Write ``ds_configs/cpu.json`` with top-level keys replaced or removed."""
    config = {**json.loads(CPU_CONFIG.read_text()), **changes}
    for key in remove:
        config.pop(key)
    path.write_text(json.dumps(config))
    return path


def environment(device: str = "cpu") -> dict[str, str]:
    """Return the environment of the commands: one kind of device, no network."""
    return {**os.environ, "DS_ACCELERATOR": device, "HF_HUB_OFFLINE": "1"}


def _run(
    command: list[object], seconds: float = SECONDS, device: str = "cpu"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment(device),
        cwd=ROOT,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
