"""The comparison: every model gets the same inputs, and a failure leaves no output."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
)
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.evaluation import comparison
from distilspeed.trainer.evaluation.arguments import EvaluateArguments
from distilspeed.trainer.evaluation.comparison import evaluate, shown_names
from distilspeed.trainer.evaluation.device_jobs import choose_device
from distilspeed.trainer.evaluation.fill_mask import fill_mask
from distilspeed.trainer.evaluation.measurements import MeasurementsFile
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.evaluation.tasks.task import Scores
from distilspeed.trainer.models.loading import load_teacher, make_student

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path) -> Path:
    """A folder with ``teacher`` and ``student``; they are random, except that they know the frequent tokens."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_teacher_dir, folder / "teacher")
    teacher = load_teacher(str(tiny_teacher_dir))
    counts = torch.from_numpy(open_corpus(small_corpus_dir).token_counts)
    teacher.cls.predictions.bias.copy_(3 * (counts + 1).log())
    teacher.save_pretrained(folder / "teacher")
    make_student(teacher, (0, 3)).save_pretrained(folder / "student")
    return folder


@pytest.fixture
def arguments(
    models: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> EvaluateArguments:
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.SECONDS", 0.05)
    return EvaluateArguments(
        teacher=str(models / "teacher"),
        student=str(models / "student"),
        data_dir=small_corpus_dir,
        output_dir=tmp_path / "out" / "evaluation",
        max_rows=12,
        task_epochs=1,
        task_seeds=2,
        device="cpu",
        seed=5,
    )


def tiny_task(folder: Path) -> Path:
    folder.mkdir()
    records = [{"text": f"the list {number}", "label": number % 2} for number in range(12)]
    for name in ("train", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_student_and_baseline_are_measured_against_the_teacher(
    arguments: EvaluateArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, int]] = []

    def recorded_fine_tune(
        name: str, task: Any, tokenizer: Any, settings: Any, seed: int, device: Any, precision: str
    ) -> Scores:
        given.append((Path(name).name, seed))
        return {"accuracy": {arguments.teacher: 0.8, arguments.student: 0.6}[name] + 0.1 * (seed - 5)}

    monkeypatch.setattr(comparison, "fine_tune", recorded_fine_tune)
    texts = ("the [MASK] of the list", "[MASK] is returned")
    whole = replace(
        arguments,
        baseline=(arguments.student,),
        task=(str(tiny_task(tmp_path / "words")),),
        fill_mask=texts,
    )
    report = evaluate(whole)

    teacher, student, baseline = report.models
    assert [model.role for model in report.models] == ["teacher", "student", "baseline"]
    model = AutoModelForMaskedLM.from_pretrained(arguments.student)
    assert student.quality == held_out_quality(model, open_corpus(arguments.data_dir), 12, seed=5)
    assert student.parameters == model.num_parameters()
    assert student.guesses == fill_mask(model, open_corpus(arguments.data_dir).load_tokenizer(), texts)
    assert teacher.guesses != student.guesses == baseline.guesses
    assert [model.name for model in report.models] == [
        f"{Path(arguments.student).parent.name}/{name}" for name in ("teacher", "student", "student")
    ]
    assert teacher.quality.accuracy > 0
    assert student.retention_percent == pytest.approx(
        100 * student.quality.accuracy / teacher.quality.accuracy
    )
    assert student.tasks[0].retention_percent == pytest.approx(100 * 0.65 / 0.85)
    assert teacher.teacher_agreement == 1.0 > student.teacher_agreement
    assert (teacher.retention_percent, teacher.latencies[0].speed_up) == (100.0, 1.0)
    assert (baseline.quality, baseline.teacher_agreement) == (student.quality, student.teacher_agreement)
    assert [seed for _, seed in given] == [5] * 3 + [6] * 3
    assert sorted(path.name for path in arguments.output_dir.iterdir()) == [
        "measurements.json",
        "report.json",
        "report.md",
        "report.png",
    ]
    assert str(tmp_path) not in (arguments.output_dir / "report.json").read_text()
    assert [path.name for path in arguments.output_dir.parent.iterdir()] == ["evaluation"]


def test_an_evaluation_killed_while_it_wrote_its_first_measurement_starts_over(
    arguments: EvaluateArguments,
) -> None:
    arguments.output_dir.mkdir(parents=True)
    (arguments.output_dir / ".measurements.json.incomplete").write_text("{")
    with raises_user_error("output-exists", "--resume"):
        evaluate(arguments)
    evaluate(replace(arguments, resume=True))
    assert not (arguments.output_dir / ".measurements.json.incomplete").exists()


def test_a_second_evaluation_in_the_same_folder_is_refused(
    arguments: EvaluateArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_second(*_: object, seed: int) -> None:
        raise AssertionError(evaluate(arguments))

    monkeypatch.setattr(comparison, "measure_held_out", start_second)
    with raises_user_error("locked", str(arguments.output_dir)):
        evaluate(arguments)
    assert not arguments.output_dir.parent.exists()


def test_a_resumed_evaluation_may_have_other_paths_and_more_tasks(
    arguments: EvaluateArguments, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [str(tiny_task(tmp_path / name)) for name in ("one", "two")]
    done: list[str] = []

    def recorded_fine_tune(name: str, task: Any, *_: object, precision: str) -> Scores:
        done.append(task.name)
        return {"accuracy": 0.5}

    monkeypatch.setattr(comparison, "fine_tune", recorded_fine_tune)
    evaluate(replace(arguments, task=(tasks[0],)))
    assert set(done) == {"one"}
    done.clear()
    monkeypatch.setattr(comparison, "measure_held_out", None)  # would fail: nothing is measured again
    shutil.copytree(models / "student", tmp_path / "moved")
    moved = replace(arguments, student=f"{tmp_path}/moved/", task=(tasks[1], f"{tasks[0]}/"), resume=True)
    report = evaluate(moved)
    assert set(done) == {"two"}
    assert [score.task for score in report.models[1].tasks] == ["two", "one"]


def test_each_model_uses_the_learning_rate_with_the_best_first_seed(
    arguments: EvaluateArguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, float, int]] = []
    best = {arguments.teacher: 3e-5, arguments.student: 2e-5}

    def recorded_fine_tune(
        name: str, task: Any, tokenizer: Any, settings: Any, seed: int, device: Any, precision: str
    ) -> Scores:
        assert precision == "bf16"
        given.append((name, settings.learning_rate, seed))
        return {"accuracy": 0.5 + 0.2 * (settings.learning_rate == best[name]) + 0.01 * seed}

    monkeypatch.setattr(comparison, "fine_tune", recorded_fine_tune)
    task = str(tiny_task(tmp_path / "words"))
    report = evaluate(
        replace(arguments, task=(task,), task_learning_rates=(2e-5, 3e-5), task_precision="bf16")
    )
    assert given == [
        (name, rate, seed)
        for tried in (((2e-5, 5), (3e-5, 5)), ((None, 6),))
        for name in (arguments.teacher, arguments.student)
        for rate, seed in ((rate or best[name], seed) for rate, seed in tried)
    ]
    assert [model.tasks[0].learning_rate for model in report.models] == [3e-5, 2e-5]
    assert report.models[0].tasks[0].scores["accuracy"] == pytest.approx((0.75, 0.76))
    assert "the best on dev of 2e-05, 3e-05 (teacher 3e-05, student 2e-05)" in report.to_markdown()
    assert "fine-tuning with AdamW in bf16." in report.to_markdown()


def test_models_get_short_unique_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*names: str) -> list[str]:
        return shown_names(names)

    for folder in ("runs/first/student", "runs/second/student", "a/runs/first/student"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    one, other = str(tmp_path / "runs/first/student"), "runs/second/student/"
    assert called("google-bert/bert-base-uncased", one) == [
        "google-bert/bert-base-uncased",
        "first/student",
    ]
    # The teacher is in a folder called "student", and student and baseline are the same folder.
    assert called(one, other, other) == ["first/student", "second/student", "second/student"]
    assert called(one, "a/runs/first/student") == [
        f"{tmp_path.name}/runs/first/student",
        "a/runs/first/student",
    ]
    monkeypatch.chdir(one)
    assert called(".", "../../second/student") == ["first/student", "second/student"]
    assert called("/") == ["/"]
    long = tmp_path / ("n" * 100)
    long.mkdir()
    assert called(str(long)) == ["…" + "n" * 60]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with raises_user_error("no-gpu", "--device cuda", "--device cpu"):
        choose_device("cuda")


def test_a_failure_while_writing_leaves_only_the_measurements(
    arguments: EvaluateArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("distilspeed.trainer.evaluation.report_files.draw_report", full_disk)
        with raises_user_error("unwritable-output", "No space left"):
            evaluate(arguments)
    assert [path.name for path in arguments.output_dir.iterdir()] == ["measurements.json"]
    assert [path.name for path in arguments.output_dir.parent.iterdir()] == ["evaluation"]
    (arguments.output_dir / ".measurements.json.incomplete").write_text("{")  # as after a kill
    (arguments.output_dir / "log.txt").write_text("mine")
    monkeypatch.setattr(comparison, "measure_latency", None)  # would fail: nothing is measured again
    monkeypatch.setattr(comparison, "measure_held_out", None)
    here = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: here + 1)  # as on another machine
    report = evaluate(replace(arguments, resume=True))
    assert report.machine.threads == here  # where the latencies were measured
    assert (arguments.output_dir / "report.json").read_text() == report.to_json()
    assert (arguments.output_dir / "log.txt").read_text() == "mine"
    assert not (arguments.output_dir / ".measurements.json.incomplete").exists()
    again = evaluate(replace(arguments, resume=True))  # a finished evaluation
    assert again.models == report.models


def test_measurements_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "measurements.json").mkdir()
    with raises_user_error("damaged-checkpoint", "measurements.json"):
        MeasurementsFile(tmp_path / "measurements.json", {})


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ("nothing", "output-exists", "--resume"),
        ("seed", "changed-run", "seed 5, not 6"),
        ("student", "changed-run", "weights of the student"),
        (
            "models",
            "changed-run",
            "models teacher, student, first, second, not teacher, student, second, first",
        ),
        ("task", "changed-run", "examples of words"),
        ("corpus", "changed-run", "corpus"),
        ("damage", "damaged-checkpoint", "measurements.json"),
    ],
)
def test_an_evaluation_is_resumed_only_with_its_settings_and_inputs(
    arguments: EvaluateArguments,
    models: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    code: str,
    named: str,
) -> None:
    monkeypatch.setattr(comparison, "fine_tune", lambda *_, precision: {"accuracy": 0.5})
    shutil.copytree(models / "student", tmp_path / "student")
    shutil.copytree(small_corpus_dir, tmp_path / "corpus")
    task = tiny_task(tmp_path / "words")
    arguments = replace(
        arguments,
        student=str(tmp_path / "student"),
        baseline=(f"first={arguments.student}", f"second={arguments.teacher}"),
        data_dir=tmp_path / "corpus",
        task=(str(task),),
    )
    evaluate(arguments)
    before = {path.name: path.read_bytes() for path in arguments.output_dir.iterdir()}
    resumed = replace(arguments, resume=change != "nothing", seed=6 if change == "seed" else arguments.seed)
    if change == "student":
        make_student(load_teacher(str(models / "teacher")), (0, 2)).save_pretrained(tmp_path / "student")
    elif change == "models":
        resumed = replace(resumed, baseline=resumed.baseline[::-1])
    elif change == "task":
        with (task / "dev.jsonl").open("a") as file:
            file.write('{"text": "one more", "label": 1}\n')
    elif change == "corpus":
        manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
        manifest["sources"][0]["name"] = "other.txt"
        (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    elif change == "damage":
        before["measurements.json"] = b"{"
        (arguments.output_dir / "measurements.json").write_bytes(b"{")
    with raises_user_error(code, named):
        evaluate(resumed)
    assert {path.name: path.read_bytes() for path in arguments.output_dir.iterdir()} == before
