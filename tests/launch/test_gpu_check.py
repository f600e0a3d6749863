"""launch/gpu_check.sh with --smoke, without a GPU; test_checks.py tests failing parts."""

import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from jobs import cpu_environment, start, wait_until
from launcher import ROOT, python

pytestmark = pytest.mark.full

SECONDS = 1800
MINUTES = SECONDS / 60
SCRIPT = ROOT / "launch" / "gpu_check.sh"


def check(teacher: Path, text: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    inputs = ["--teacher", teacher, "--text", text, "--output_dir", output, "--minutes", MINUTES]
    return start(
        ["bash", SCRIPT, "--smoke", *inputs, *more], cpu_environment(PYTHON=sys.executable), output.parent
    )


def test_every_part_runs(tiny_teacher_dir: Path, reference_text: Path, tmp_path: Path) -> None:
    job = check(tiny_teacher_dir, reference_text, tmp_path / "out")
    printed, errors = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, (printed, errors[-3000:])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    # The sanitizer is part of CUDA.
    assert parts.pop("memcheck of the kernels")["status"] in ("not installed", "passed")
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        (
            "preparation",
            "tests of the kernels",
            "tests of the trainer",
            "distillation",
            "evaluation",
            "training, rows of 64, ZeRO-2",
            "training, rows of 64, not compiled",
            "V100 recipe",
            "kernels, 64 rows, fp32",
        ),
        "passed",
    )
    setting = parts["training, rows of 64, ZeRO-2"]["result"]["setting"]
    assert setting["zero_stage"] == 2
    assert "limited_to" not in setting
    assert setting["compile"] == "off", "auto, on a CPU"
    assert parts["training, rows of 64, not compiled"]["result"]["setting"]["compile"] == "off"
    assert parts["V100 recipe"]["result"]["setting"]["limited_to"] == "V100"
    assert [model["role"] for model in parts["evaluation"]["result"]["models"]] == [
        "teacher",
        "student",
        "baseline",
    ]
    assert parts["kernels, 64 rows, fp32"]["result"]["groups"]
    assert printed == (tmp_path / "out" / "report.md").read_text()
    assert "of eager" in printed, "the benchmark's table"


def test_the_generated_teacher_and_text_are_enough_for_the_longest_rows(tmp_path: Path) -> None:
    gpu_check = runpy.run_path(str(ROOT / "launch" / "gpu_check.py"))
    sizes = replace(gpu_check["Sizes"](), measured=gpu_check["SMOKE"].measured)
    arguments = gpu_check["GpuCheckArguments"](output_dir=tmp_path)
    plan = gpu_check["Plan"](arguments, sizes)
    plan.write_inputs()
    (trains_teacher, *_) = plan.distillation().commands
    for command in [*plan.preparation().commands, [*trains_teacher, "--plan"]]:
        result = python(*command[1:])
        assert result.returncode == 0, result.stderr
    assert "global batch 256" in result.stdout
    assert max(sizes.micro_batches) == 512
    manifest = json.loads((plan.corpus(512) / "manifest.json").read_text())
    assert manifest["counts"]["train_rows"] > 500


def test_when_terminated_it_leaves_no_process_running(
    tiny_teacher_dir: Path, reference_text: Path, tmp_path: Path
) -> None:
    job = check(tiny_teacher_dir, reference_text, tmp_path / "out", "--parts", "distillation", "tests")

    def others() -> list[int]:
        return [process.pid for process in psutil.process_iter() if was_started_by(process, job.pid)]

    wait_until(lambda: (tmp_path / "out" / "distilled" / "train_config.json").exists(), job)
    started = others()
    assert started, "the training"
    os.kill(job.pid, signal.SIGTERM)
    job.communicate(timeout=600)
    assert job.returncode == 128 + signal.SIGTERM
    wait_until(lambda: not any(map(psutil.pid_exists, started)))


def was_started_by(process: psutil.Process, pid: int) -> bool:
    try:
        return pid in {parent.pid for parent in process.parents()}
    except psutil.Error:
        return False
