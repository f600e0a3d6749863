"""The training step under the launcher: waits for the device, compilation, workers."""

import json
import re
import shutil
from pathlib import Path

import pytest
from launcher import CPU_CONFIG, ROOT, deepspeed, python, training_flags
from user_errors import assert_names

from distilspeed.trainer.training.metrics import StepMetrics, read_metrics
from distilspeed.trainer.training.record import read_record

STEP_JOB = Path(__file__).with_name("step_job.py")
STEPS = 3


def test_the_host_does_not_wait_for_the_device_between_optimiser_steps(
    tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, device: str
) -> None:
    result = python(STEP_JOB, CPU_CONFIG, tiny_teacher_dir, small_corpus_dir, tmp_path / "run", device=device)
    assert result.returncode == 0, result.stderr[-3000:]
    waits = json.loads(result.stdout.splitlines()[-1])
    for of_a_step in waits.values():
        assert "step_job.py" in of_a_step.pop(), "a wait is not noticed"
    assert waits["4"] == waits["1"], "a micro-step waits"
    if device == "cuda":  # the warning names a line of torch
        return
    # DeepSpeed's own reading of the gradient's norm, once per optimiser step.
    assert {wait.partition(" in ")[2].partition(":")[0] for wait in waits["1"]} <= {"utils.py"}


WITHOUT_COLLECTOR = """
import gc, runpy, sys
gc.disable()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.full
def test_it_ends_with_workers_without_garbage_collection(
    tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> None:
    arguments = arguments_of(tmp_path / "run", tiny_teacher_dir, small_corpus_dir)
    command = ("-c", WITHOUT_COLLECTOR, ROOT / "launch" / "train.py", *arguments)
    result = python(*command, "--dataloader_num_workers", 1)
    assert result.returncode == 0, result.stderr[-3000:]


def arguments_of(output: Path, teacher: Path, corpus: Path) -> list[object]:
    return training_flags(teacher, corpus, output, max_steps=STEPS)


def metrics_of(output: Path, teacher: Path, corpus: Path, device: str, *flags: object) -> list[StepMetrics]:
    arguments = arguments_of(output, teacher, corpus)
    result = deepspeed(ROOT / "launch" / "train.py", *arguments, *flags, ranks=1, device=device)
    assert result.returncode == 0, result.stderr[-3000:]
    return read_metrics(output / "metrics.jsonl")


@pytest.mark.full
def test_with_compile_and_workers_the_step_is_the_same(
    tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, device: str
) -> None:
    plain = metrics_of(tmp_path / "plain", tiny_teacher_dir, small_corpus_dir, device)
    flags = ("--compile", "on", "--dataloader_num_workers", 2)
    compiled = metrics_of(tmp_path / "compiled", tiny_teacher_dir, small_corpus_dir, device, *flags)
    for one, other in zip(plain, compiled, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-3)


def go_back(run: Path) -> None:
    """Put a finished run back to its second step."""
    shutil.rmtree(run / "student")
    for checkpoint in (run / "checkpoints").glob("step_*"):
        if checkpoint.name != "step_2":
            shutil.rmtree(checkpoint)


@pytest.mark.full
def test_a_resumed_run_compiles_as_at_its_start_and_computes_the_same_bits(
    tmp_path: Path, dropout_teacher_dir: Path, small_corpus_dir: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train = (ROOT / "launch" / "train.py", "--save_steps", 2)
    given = arguments_of(whole, dropout_teacher_dir, small_corpus_dir)
    result = deepspeed(*train, *given, "--compile", "on", ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "layers: compiled in the first step" in result.stdout
    [seconds] = re.findall(r"compiling the layers took ([\d.]+) s", result.stdout)
    assert float(seconds) > 0

    shutil.copytree(whole, resumed)
    go_back(resumed)
    given = arguments_of(resumed, dropout_teacher_dir, small_corpus_dir)
    result = deepspeed(*train, *given, "--resume", ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "layers: compiled in the first step" in result.stdout
    weights = [(run / "student" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]

    go_back(resumed)
    result = deepspeed(*train, *given, "--resume", "--compile", "off", ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "compile on -> off" in result.stdout
    record = read_record(resumed)
    assert record is not None
    assert record.compile == "off"


@pytest.mark.full
def test_a_compiler_that_fails_is_reported_before_anything_is_written(
    tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    arguments = arguments_of(tmp_path / "run", tiny_teacher_dir, small_corpus_dir)
    result = deepspeed(ROOT / "launch" / "train.py", *arguments, "--compile", "on", ranks=2)
    assert result.returncode == 2, result.stderr[-3000:]
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert_names(line, "unusable-kernels", "torch.compile fails", "--compile off")
    assert not list((tmp_path / "run").iterdir())
