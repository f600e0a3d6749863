"""launch/gpu_check.sh: every part runs where there is no GPU, in small, and none stops the others."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from jobs import cpu_environment, finish, start, wait_until
from launcher import ROOT
from training import processes_of

SCRIPT = ROOT / "launch" / "gpu_check.sh"


def check(teacher: Path, text: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    inputs = ["--teacher", teacher, "--text", text, "--output_dir", output.name]
    return start(["bash", SCRIPT, "--smoke", *inputs, *more], cpu_environment(), output.parent)


@pytest.mark.slow
def test_parts_that_fail_stop_no_other(tiny_teacher_dir: Path, reference_text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    job = check(tiny_teacher_dir, reference_text, tmp_path / "out", "--task", tmp_path / "empty")
    status, printed, errors = finish(job)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    assert status == 1, errors[-3000:]
    # The sanitizer comes with CUDA.
    assert parts.pop("memcheck of the kernels")["outcome"] in ("not run", "passed")
    failed = parts.pop("evaluation")
    assert failed["outcome"] == "failed"
    assert failed["said"].startswith("error: cannot read")
    assert set(parts) == {
        "preparation",
        "tests of the kernels",
        "tests of the trainer",
        "distillation",
        "training, rows of 64, ZeRO-2",
        "kernels, 64 rows, fp32",
        "V100 recipe",
    }
    assert {part["outcome"] for part in parts.values()} == {"passed"}, printed
    assert parts["training, rows of 64, ZeRO-2"]["result"]["setting"]["zero_stage"] == 2
    assert parts["V100 recipe"]["result"]["ratio"] > 0
    assert parts["kernels, 64 rows, fp32"]["result"]["groups"]
    assert (tmp_path / "out" / "distilled" / "student" / "model.safetensors").exists()
    assert printed.strip() == (tmp_path / "out" / "report.md").read_text().strip()
    assert "| evaluation | failed |" in printed
    assert "of eager" in printed, "the benchmark's table"


def test_over_its_time_it_ends_what_runs_and_reports(
    tiny_teacher_dir: Path, reference_text: Path, tmp_path: Path
) -> None:
    status, printed, _ = finish(check(tiny_teacher_dir, reference_text, tmp_path / "out", "--minutes", 0.01))
    assert status == 1
    outcomes = {
        part["outcome"] for part in json.loads((tmp_path / "out" / "report.json").read_text())["parts"]
    }
    assert outcomes <= {"timed out", "not run"}
    assert "ended for want of time" in printed


def test_interrupted_it_leaves_nothing_running(
    tiny_teacher_dir: Path, reference_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "out" / "distilled"
    job = check(tiny_teacher_dir, reference_text, tmp_path / "out", "--parts", "distillation", "tests")
    wait_until(lambda: "rank 0" in processes_of(Path("out/distilled")), job)
    os.killpg(job.pid, signal.SIGINT)
    finish(job)
    wait_until(lambda: not processes_of(Path("out/distilled")), seconds=60)
    assert not (run / "student").exists()
