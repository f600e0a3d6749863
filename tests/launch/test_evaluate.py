"""launch/evaluate.py: its files, table, exit status and error line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from user_errors import assert_names

from distilspeed.trainer.models.loading import load_teacher, make_student

COMMAND = Path(__file__).parents[2] / "launch" / "evaluate.py"


def run_evaluate(*options: object) -> subprocess.CompletedProcess[str]:
    # No access to the hub; on tiny models two threads cost more than they save.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(COMMAND), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).save_pretrained(folder)
    return folder


def test_the_command_writes_a_report_and_prints_its_table(
    tiny_teacher_dir: Path, student_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    task = tmp_path / "words"
    task.mkdir()
    records = [{"text_a": "the list", "text_b": f"number {i}", "label": i % 2} for i in range(16)]
    for name in ("train", "dev"):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "evaluation"
    models = ("--teacher", tiny_teacher_dir, "--student", student_dir, "--baseline", student_dir)
    models += ("--baseline", f"again={student_dir}")
    small = ("--max_rows", 8, "--task", task, "--task_epochs", 1, "--task_seeds", 2, "--device", "cpu")
    done = run_evaluate(*models, "--data_dir", small_corpus_dir, "--output_dir", output, *small)

    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert ["no tokenizer files" in line for line in warnings] == [True] * 3  # student and baselines
    report = json.loads((output / "report.json").read_text())
    assert [model["role"] for model in report["models"]] == ["teacher", "student", "baseline", "again"]
    assert [score["task"] for score in report["models"][1]["tasks"]] == ["words"]
    assert len(report["models"][1]["tasks"][0]["scores"]["accuracy"]) == 2
    assert done.stdout.strip() in (output / "report.md").read_text()
    assert len(done.stdout.strip().splitlines()) == 6
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation", "words"]


def test_bad_input_is_one_line_and_status_2(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    models = ("--teacher", tiny_teacher_dir, "--student", "nowhere")
    output = tmp_path / "runs" / "evaluation"
    done = run_evaluate(*models, "--data_dir", small_corpus_dir, "--output_dir", output)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert_names(line, "unusable-model", "student nowhere")
    assert not any(tmp_path.iterdir())
