"""launch/evaluate.py: its files, table, exit status and error line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import cpu_environment, kill, start, wait_until
from user_errors import assert_names

from distilspeed.trainer.models.loading import load_teacher, make_student

COMMAND = Path(__file__).parents[2] / "launch" / "evaluate.py"


def run_evaluate(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMMAND), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, env=cpu_environment())


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    make_student(load_teacher(str(tiny_teacher_dir)), (0, 3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher_dir: Path,
    student_dir: Path,
    small_corpus_dir: Path,
) -> list[object]:
    """Four models and eight fine-tuning runs of about half a second."""
    task = tmp_path_factory.mktemp("tasks") / "words"
    task.mkdir()
    records = [{"text_a": "the list", "text_b": f"number {i}", "label": i % 2} for i in range(16)]
    for name in ("train", "dev"):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    models = ("--teacher", tiny_teacher_dir, "--student", student_dir, "--baseline", student_dir)
    models += ("--baseline", f"again={student_dir}")
    models += ("--fill_mask", "the [MASK] of the list", "--fill_mask", "[MASK] | or")
    small = ("--max_rows", 8, "--task", task, "--task_epochs", 30, "--task_seeds", 2, "--device", "cpu")
    return [*models, "--data_dir", small_corpus_dir, *small]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, options: list[object]) -> Path:
    """The output of an evaluation without interruption, with its stdout.txt and stderr.txt beside it."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_evaluate(*options, "--output_dir", folder / "evaluation")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["evaluation"]
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_the_command_writes_a_report_and_prints_its_table(whole: Path) -> None:
    output, stdout, stderr = (
        whole / "evaluation",
        (whole / "stdout.txt").read_text(),
        (whole / "stderr.txt").read_text(),
    )
    warnings = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert ["no tokenizer files" in line for line in warnings] == [True] * 3  # student and baselines
    report = json.loads((output / "report.json").read_text())
    assert [model["role"] for model in report["models"]] == ["teacher", "student", "baseline", "again"]
    assert [score["task"] for score in report["models"][1]["tasks"]] == ["words"]
    assert len(report["models"][1]["tasks"][0]["scores"]["accuracy"]) == 2
    assert stdout.strip() in (output / "report.md").read_text()
    assert len(stdout.strip().splitlines()) == 6
    assert [len(model["guesses"]) for model in report["models"]] == [2] * 4
    assert "| `[MASK] \\| or` | " in (output / "report.md").read_text()
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_killed_and_resumed_it_repeats_nothing_and_ends_with_the_same_scores(
    options: list[object], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "evaluation"
    measurements = output / "measurements.json"

    def runs() -> list[str]:
        return list(json.loads(measurements.read_text())["runs"]) if measurements.exists() else []

    job = start([sys.executable, COMMAND, *options, "--output_dir", output], cpu_environment(), tmp_path)
    wait_until(lambda: len(runs()) >= 2, job)
    kill(job)
    finished = runs()
    assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == ["measurements.json"]
    assert 2 <= len(finished) < 8

    done = run_evaluate(*options, "--output_dir", output, "--resume")
    assert done.returncode == 0, done.stderr
    assert "latency" not in done.stderr
    assert "held-out rows" not in done.stderr
    assert done.stderr.count(", seed ") == 8 - len(finished)
    ours, theirs = (
        json.loads((folder / "report.json").read_text()) for folder in (output, whole / "evaluation")
    )
    for one, other in zip(ours["models"], theirs["models"], strict=True):
        assert (one["tasks"], one["quality"]) == (other["tasks"], other["quality"])
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation"]


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
