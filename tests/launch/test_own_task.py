"""A user's own task: a class and an entry in the registry give it all features of the project's own tasks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import ROOT, ranks_alone
from refusals import refusal
from similarity_job import Similarity
from transformers import AutoTokenizer

from distilspeed.trainer.evaluation.fine_tuning import fine_tune
from distilspeed.trainer.evaluation.tasks import registry
from distilspeed.trainer.evaluation.tasks.task import FineTuning

pytestmark = pytest.mark.usefixtures("one_thread")

JOB = Path(__file__).with_name("similarity_job.py")


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task whose number depends on the first sentence's noun."""
    folder = tmp_path_factory.mktemp("tasks") / "alike"
    folder.mkdir()
    nouns = ("list", "class", "name")
    lines = [f"{2.5 * (i % 3)}\tthe {nouns[i % 3]} number {i // 3}\ta function\n" for i in range(150)]
    (folder / "train.tsv").write_text("".join(lines[:120]))
    (folder / "dev.tsv").write_text("".join(lines[120:]))
    return folder


def options(teacher: Path, corpus: Path, task: Path, output: Path) -> list[object]:
    given = {
        "--teacher": teacher,
        "--student": teacher,
        "--data_dir": corpus,
        "--output_dir": output,
        "--task": task,
        "--task_seeds": 2,
        "--task_batch_size": 8,
        "--max_rows": 4,
        "--device": "cpu",
    }
    return [part for pair in given.items() for part in pair]


@pytest.fixture(scope="module")
def evaluation(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path, task_dir: Path
) -> Path:
    folder = tmp_path_factory.mktemp("own_task") / "evaluation"
    result = ranks_alone(JOB, *options(tiny_teacher_dir, small_corpus_dir, task_dir, folder), ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture
def report(evaluation: Path) -> dict[str, Any]:
    return json.loads((evaluation / "report.json").read_text())


def test_its_metrics_are_reported_and_the_first_decides_retention(
    evaluation: Path, report: dict[str, Any]
) -> None:
    (score,) = report["models"][1]["tasks"]
    assert list(score["scores"]) == ["pearson", "within_one"]
    assert [len(of_seeds) for of_seeds in score["scores"].values()] == [2, 2]
    assert score["mean"] == pytest.approx(sum(score["scores"]["pearson"]) / 2)
    (of_teacher,) = report["models"][0]["tasks"]
    assert score["scores"] == of_teacher["scores"], "the same model, with the same seeds"
    assert "| alike pearson / within_one (retention) |" in (evaluation / "report.md").read_text()


def test_its_defaults_apply_without_flags(evaluation: Path, report: dict[str, Any]) -> None:
    (task,) = report["conditions"]["tasks"]
    assert task["fine_tuning"] == {"epochs": 2, "learning_rate": 3e-5, "batch_size": 8, "max_length": 64}
    line = (
        "- alike: pearson and within_one; 2 epochs, learning rate 3e-05, batch 8, at most 64 tokens; "
        "120 training and 30 dev examples."
    )
    assert line in (evaluation / "report.md").read_text().splitlines()


def test_the_report_has_only_its_own_entries(report: dict[str, Any]) -> None:
    (task,) = report["conditions"]["tasks"]
    assert set(task) == {"name", "metrics", "train_examples", "dev_examples", "fine_tuning"}


def test_fine_tuning_learns_it(tiny_teacher_dir: Path, small_tokenizer_dir: Path, task_dir: Path) -> None:
    settings = FineTuning(epochs=6, learning_rate=2e-3, batch_size=16, max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    task = Similarity.read(str(task_dir))
    scores = fine_tune(str(tiny_teacher_dir), task, tokenizer, settings, seed=0, device=torch.device("cpu"))
    assert scores["pearson"] > 0.9
    assert scores["within_one"] > 0.8


def test_its_place_in_the_registry_does_not_matter(task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kinds in ([*registry.TASKS, Similarity], [Similarity, *registry.TASKS]):
        monkeypatch.setattr(registry, "TASKS", kinds)
        (task,) = registry.read_tasks([str(task_dir)])
        assert isinstance(task, Similarity)


def test_without_its_entry_in_the_registry_it_is_refused(
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    task_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = options(tiny_teacher_dir, small_corpus_dir, task_dir, tmp_path / "evaluation")
    line = refusal("evaluate.py", given, tmp_path, monkeypatch, capfd)
    assert "a task is a folder with train.jsonl and dev.jsonl" in line


def test_the_docs_show_this_task() -> None:
    page = (ROOT / "docs" / "add_a_task.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert code in JOB.read_text()
