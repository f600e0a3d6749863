"""launch/v100x8.sh on a machine without GPUs."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import (
    assert_same_end,
    cpu_environment,
    finish,
    processes_naming,
    start,
    training,
    wait_for_checkpoint,
    was_interrupted,
    works_in,
)
from launcher import ROOT, error_lines
from user_errors import assert_names

from distilspeed.trainer.engine.config_batch import resolve_batch_equation
from distilspeed.trainer.engine.config_file import read_deepspeed_config

SCRIPT = ROOT / "launch" / "v100x8.sh"
CONFIG = ROOT / "ds_configs" / "v100x8_fp16.json"

# Stand-ins for torch, with a test's number and kind of GPUs and the architectures of the build, and for DeepSpeed's
# launcher, which prints its arguments.
TORCH = """
__version__ = "2.13.0"
class cuda:
    device_count = staticmethod(lambda: {gpus})
    get_device_capability = staticmethod(lambda index: {capability})
    get_device_name = staticmethod(lambda index: "Tesla V100-SXM2-32GB")
    get_arch_list = staticmethod(lambda: {architectures})
"""
LAUNCHER = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.mark.full
def test_terminated_and_run_again_it_equals_an_uninterrupted_run(
    uninterrupted_run: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    # From a user's folder, with paths relative to it.
    command = ["bash", SCRIPT, *training(tiny_teacher_dir, small_corpus_dir, Path("a run"))]
    environment = cpu_environment(NUM_GPUS=2)
    job = start(command, environment, tmp_path)
    wait_for_checkpoint(run, job)
    job.terminate()
    finish(job)
    assert was_interrupted(run)
    assert not [process for process in processes_naming("train.py") if works_in(process, tmp_path)]

    status, _, errors = finish(start(command, environment, tmp_path))
    assert status == 0, errors[-3000:]
    assert_same_end(run, uninterrupted_run)


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
def test_its_config_gives_4096_rows_in_fp16_on_every_power_of_two(gpus: int) -> None:
    config = read_deepspeed_config(CONFIG)
    assert resolve_batch_equation(config, gpus).train_batch_size == 4096
    assert config.precision == "fp16"
    assert config.section("fp16")["loss_scale"] == 0  # dynamic


@pytest.mark.full
def test_a_number_of_gpus_that_does_not_divide_4096_is_refused_in_one_line(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    arguments = [
        "--teacher",
        tiny_teacher_dir,
        "--data_dir",
        small_corpus_dir,
        "--output_dir",
        tmp_path / "run",
    ]
    job = start(["bash", SCRIPT, *arguments], cpu_environment(NUM_GPUS=3), tmp_path)
    status, _, errors = finish(job)
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "indivisible-batch", "train_batch_size 4096", "4032 and 4128")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("gpus", "capability", "architectures", "shown"),
    [
        (4, (7, 0), ["sm_70"], "8 GPUs are needed and torch finds 4"),
        (8, (7, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], "no code for Tesla V100-SXM2-32GB (sm_70)"),
        (8, (12, 1), ["sm_90", "sm_100"], "(sm_121)"),
    ],
)
def test_too_few_gpus_or_gpus_unknown_to_torch_are_refused(
    gpus: int, capability: tuple[int, int], architectures: list[str], shown: str, tmp_path: Path
) -> None:
    result = with_torch(tmp_path, gpus, capability, architectures)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert shown in error_lines(result)[0]


@pytest.mark.parametrize(
    ("capability", "architectures"),
    [
        ((7, 0), ["sm_60", "sm_70"]),
        ((8, 9), ["sm_80"]),
        ((12, 0), ["sm_90", "compute_90"]),
        ((9, 0), ["sm_90a"]),
    ],
)
def test_supported_gpus_are_used_in_their_visible_order(
    capability: tuple[int, int], architectures: list[str], tmp_path: Path
) -> None:
    result = with_torch(tmp_path, 8, capability, architectures, CUDA_VISIBLE_DEVICES="7,6,5,4,3,2,1,0,9")
    assert result.returncode == 0, result.stderr
    given = json.loads(result.stdout)
    world = next(part.removeprefix("--world_info=") for part in given if part.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": list("76543210")}
    assert given[-2:] == ["--teacher", "a teacher's $name"]


def with_torch(
    folder: Path, gpus: int, capability: tuple[int, int], architectures: list[str], **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with the stand-ins."""
    stand_in = TORCH.format(gpus=gpus, capability=capability, architectures=architectures)
    (folder / "torch.py").write_text(stand_in)
    package = folder / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (package / "launch.py").write_text(LAUNCHER)
    for initial in (package.parent, package):
        (initial / "__init__.py").touch()
    return subprocess.run(
        ["bash", SCRIPT, "--teacher", "a teacher's $name"],
        capture_output=True,
        text=True,
        env=cpu_environment(PYTHONPATH=folder, DS_ACCELERATOR="cuda", **more),
        check=False,
        timeout=1200,
    )


def test_a_python_without_the_project_is_not_taken_because_it_is_called_in_a_checkout(tmp_path: Path) -> None:
    """After the quickstart only .venv has the project, and the user's shell is in the checkout."""
    for path, option in (("bin/python", "-S"), (".venv/bin/python", "")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(f'#!/bin/sh\nexec "{sys.executable}" {option} "$@"\n')
        (tmp_path / path).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH")}
    found = subprocess.run(
        ["bash", "-c", f'root="{tmp_path}"; . launch/job.sh; find_python; cd /; "$python" -c "import torch"'],
        cwd=ROOT,
        env=environment | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert found.returncode == 0, found.stderr
