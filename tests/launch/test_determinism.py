"""With --full_determinism an interrupted and resumed run is bitwise equal, on a GPU as on a CPU."""

import os
import shutil
from pathlib import Path

import pytest
from jobs import assert_same_end, finish
from launcher import write_config
from training import CPU_HAS_FP16, FAULTY, STEPS, Training

from distilspeed.trainer.job.environment import prepare_environment
from distilspeed.trainer.training.metrics import read_metrics

# A run of 24 updates and 2 skipped batches. The second is skipped after the checkpoint of step 22, after 23 batches.
OVERFLOWS = (7, 24)


@pytest.mark.full
def test_a_run_with_fp16_overflows_resumes_bitwise(
    dropout_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path, device: str
) -> None:
    if device == "cpu" and not CPU_HAS_FP16:
        pytest.skip("this CPU has no fp16")
    training = Training(dropout_teacher_dir, small_corpus_dir, tmp_path / "run", ranks=1)
    fp16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    training.config = write_config(tmp_path / "fp16.json", {"fp16": fp16})
    environment = {
        "DS_ACCELERATOR": device,
        "FAULT_KIND": "gradient",
        "FAULT_RANK": 0,
        "FAULT_BATCHES": ",".join(map(str, OVERFLOWS)),
    }

    def train() -> None:
        status, _, errors = finish(training.start("--full_determinism", script=FAULTY, **environment))
        assert status == 0, errors[-3000:]

    train()
    straight = tmp_path / "straight"
    shutil.copytree(training.run, straight)
    lines = read_metrics(straight / "metrics.jsonl")
    assert [line.skipped for line in lines] == [0] * 7 + [1] * 16 + [2]
    assert [line.loss_scale for line in lines] == [256] * 7 + [128] * 16 + [64]

    shutil.rmtree(training.run / "student")
    shutil.rmtree(training.run / "checkpoints" / f"step_{STEPS:09d}")
    train()
    assert_same_end(training.run, straight)


def test_cublas_is_configured_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment()
    assert "CUBLAS_WORKSPACE_CONFIG" not in environment
    prepare_environment(full_determinism=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
