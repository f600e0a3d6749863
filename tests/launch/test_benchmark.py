"""launch/benchmark.py: both contestants run in separate processes; its output and errors."""

import json
from pathlib import Path

import pytest
from launcher import CPU_CONFIG, ROOT, error_lines, python
from user_errors import assert_names

from distilspeed.trainer.engine.phases import COMMUNICATION

BENCHMARK = ROOT / "launch" / "benchmark.py"


def arguments(teacher: object, corpus: Path) -> list[object]:
    options = {
        "--deepspeed_config": CPU_CONFIG,
        "--teacher": teacher,
        "--data_dir": corpus,
        "--per_device_train_batch_size": 8,
        "--train_batch_size": 16,
        "--rounds": 2,
    }
    return [part for pair in options.items() for part in pair]


@pytest.mark.full
def test_it_compares_measures_and_stores(
    tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_b3V0c2lkZXIx")
    output = tmp_path / "result.json"
    command = [BENCHMARK, *arguments(tiny_teacher_dir, small_corpus_dir), "--ranks", "2", "--output", output]
    result = python(*command)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "hf_b3V0c2lkZXIx" not in output.read_text() + result.stdout + result.stderr
    report = json.loads(output.read_text())
    assert len(report["ratios"]) == 2
    assert report["ratio"] > 0
    assert all(0 < report["mfu"][name] < 1 for name in ("ours", "eager"))
    assert all(report["peak"][name] > report["resident"][name] > 0 for name in ("ours", "eager"))
    shares = {name: share for name, share in report["phases"].items() if name != COMMUNICATION}
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0, shares
    assert report["scaling"]["2"] > 0
    assert f"{report['ratio']:.2f}x" in result.stdout
    again = python(*command)
    assert again.returncode == 2, "the result was written over"
    (line,) = error_lines(again)
    assert_names(line, "output-exists", str(output))


def test_a_contestant_that_cannot_start_gives_one_line(tmp_path: Path, small_corpus_dir: Path) -> None:
    result = python(BENCHMARK, *arguments(tmp_path / "none", small_corpus_dir))
    assert result.returncode == 2
    (line,) = error_lines(result)
    assert_names(line, "unusable-model", str(tmp_path / "none"))
