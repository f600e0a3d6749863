"""The report: its arithmetic, and its three files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from distilspeed.trainer.evaluation.fill_mask import Guess
from distilspeed.trainer.evaluation.latency import Latency
from distilspeed.trainer.evaluation.report import (
    Environment,
    EvaluationConditions,
    ModelReport,
    Report,
    TaskScore,
    glue_scores,
    percent_of,
)
from distilspeed.trainer.evaluation.report_files import draw_report, write_report
from distilspeed.trainer.evaluation.tasks.jsonl_classification import ClassificationConditions
from distilspeed.trainer.evaluation.tasks.task import FineTuning, Scores
from distilspeed.trainer.evaluation.token_quality import MaskedTokenQuality

FINE_TUNING = FineTuning(epochs=3, learning_rate=5e-5, batch_size=32, max_length=64)


def of_seeds(accuracies: list[float]) -> list[Scores]:
    return [{"accuracy": accuracy} for accuracy in accuracies]


def model_report(role: str, accuracy: float, milliseconds: float, task: list[float]) -> ModelReport:
    return ModelReport(
        role=role,
        name=f"{role}-name",
        parameters=2_000_000,
        parameters_percent=60.0,
        quality=MaskedTokenQuality(
            loss=2.5,
            accuracy=accuracy,
            masked_tokens=100,
            training_masks_loss=3.25,
            training_masks_accuracy=accuracy / 2,
        ),
        retention_percent=percent_of(accuracy, 0.5),
        teacher_agreement=0.75,
        latencies=(
            Latency.of("CPU", (1, 32), np.full(5, milliseconds / 4), np.full(5, 5.0)),
            Latency.of("CPU", (1, 128), np.full(5, milliseconds), np.full(5, 20.0)),
            Latency.of("CPU", (32, 128), np.full(3, 160 * milliseconds), np.full(3, 1600.0)),
        ),
        tasks=(TaskScore.of("rte", of_seeds(task), of_seeds([0.8, 0.8]), 5e-5),),
    )


@pytest.fixture
def report() -> Report:
    return Report(
        models=(
            model_report("teacher", 0.5, 20.0, [0.8, 0.8]),
            model_report("student", 0.45, 8.0, [0.7, 0.9]),
            model_report("baseline", 0.25, 8.0, [0.4, 0.4]),
        ),
        conditions=EvaluationConditions(
            corpus="mine",
            held_out_rows=10,
            seq_length=64,
            seed=0,
            fill_mask=(),
            tasks=(ClassificationConditions("rte", ("accuracy",), 100, 20, FINE_TUNING, 2, 0.55),),
            task_seeds=2,
            task_learning_rates=None,
            task_precision="fp32",
        ),
        machine=Environment.here(torch.device("cpu")),
    )


def test_speed_up_is_the_ratio_of_the_medians() -> None:
    latency = Latency.of("CPU", (32, 512), np.array([1.0, 2.0, 3.0, 4.0, 90.0]), np.array([6.0, 6.0, 90.0]))
    assert (latency.first_quartile_ms, latency.median_ms, latency.third_quartile_ms) == (2.0, 3.0, 4.0)
    assert (latency.speed_up, latency.repetitions) == (2.0, 5)
    assert (latency.batch_size, latency.length) == (32, 512)


def test_a_task_score_is_mean_sample_deviation_and_share_of_the_teachers_mean() -> None:
    score = TaskScore.of("rte", of_seeds([0.7, 0.9]), of_seeds([0.9, 1.0, 1.1]), 5e-5)
    assert score.mean == pytest.approx(0.8)
    assert score.standard_deviation == pytest.approx(0.02**0.5)
    assert score.retention_percent == pytest.approx(80.0)
    # The relative deviations of both models, 0.1414 / 0.8 and 0.1 / 1.0, added as errors of a quotient are.
    assert score.retention_deviation == pytest.approx(80 * (0.02 / 0.8**2 + 0.1**2) ** 0.5)
    one_seed = TaskScore.of("rte", of_seeds([0.7]), of_seeds([0.7]), 5e-5)
    assert (one_seed.standard_deviation, one_seed.retention_deviation) == (None, None)
    teacher = of_seeds([0.7, 0.8])
    assert TaskScore.of("rte", teacher, teacher, 5e-5).retention_deviation is None


def test_the_glue_score_is_the_mean_of_the_tasks_with_and_without_wnli() -> None:
    def score(task: str, **metrics: tuple[float, ...]) -> TaskScore:
        return replace(TaskScore.of(f"glue/{task}", of_seeds([0.5]), of_seeds([0.5]), 5e-5), scores=metrics)

    seven = [
        score(task, accuracy=(0.5, 0.7)) for task in ("cola", "sst2", "stsb", "qqp", "mnli", "qnli", "rte")
    ]
    mrpc, wnli = score("mrpc", accuracy=(0.8, 0.8), f1=(0.9, 0.9)), score("wnli", accuracy=(0.2, 0.2))
    without = (7 * 0.6 + 0.85) / 8
    assert glue_scores([*seven, mrpc]) == {"GLUE without WNLI": pytest.approx(without)}
    assert glue_scores([*seven, mrpc, wnli])["GLUE"] == pytest.approx((8 * without + 0.2) / 9)
    assert glue_scores([*seven, wnli]) == {}


def test_the_first_of_several_metrics_decides_retention_and_all_are_in_the_table(report: Report) -> None:
    teacher: list[Scores] = [{"f1": 0.8, "accuracy": 0.9}, {"f1": 0.8, "accuracy": 0.9}]
    student: list[Scores] = [{"f1": 0.5, "accuracy": 0.6}, {"f1": 0.7, "accuracy": 0.6}]
    score = TaskScore.of("mrpc", student, teacher, 5e-5)
    assert (score.mean, score.retention_percent) == (pytest.approx(0.6), pytest.approx(75.0))
    assert score.scores == {"f1": (0.5, 0.7), "accuracy": (0.6, 0.6)}
    table = replace(report, models=(replace(report.models[0], tasks=(score,)),)).table()
    assert "| mrpc f1 / accuracy (retention) |" in table
    assert "| 60.0 ± 14.1 / 60.0 ± 0.0 (75.0 ± 17.7 %) |" in table


@pytest.mark.parametrize("teacher", [0.0, -0.1])
def test_there_is_no_retention_if_the_teacher_scores_zero_or_less(teacher: float) -> None:
    assert percent_of(0.3, teacher) is None


def test_the_table_has_one_row_per_model(report: Report) -> None:
    heading, _, teacher, student, baseline = report.table().splitlines()
    assert heading.count("|") == teacher.count("|") == student.count("|") == baseline.count("|")
    for columns in (
        "| parameters | fp32 / fp16 | masked loss | masked accuracy | retention | same token as teacher |",
        "| masks of training: accuracy / loss | CPU latency (speed-up) |",
    ):
        assert columns in heading
    assert (
        "| student (student-name) | 2.00 M | 8.0 / 4.0 MB | 2.500 | 45.0 % | 90.0 % | 75.0 % | 22.5 % / 3.250 |"
        in student
    )
    # One latency: that of one sequence of 128 tokens.
    assert "| 8.00 [8.00, 8.00] ms (2.50×) | 80.0 ± 14.1 (100.0 ± 17.7 %) |" in student
    assert "| 40.0 ± 0.0 (50.0 ± 0.0 %) |" in baseline


def test_the_second_table_has_the_latencies_of_every_setting(report: Report) -> None:
    heading, _, *rows = report.latency_table().splitlines()
    assert heading == "| batch × tokens | teacher | student | baseline |"
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| CPU, 1 × 32", "5.00 [5.00, 5.00] ms (1.00×)", "2.00 [2.00, 2.00] ms (2.50×)"],
        ["| CPU, 1 × 128", "20.0 [20.0, 20.0] ms (1.00×)", "8.00 [8.00, 8.00] ms (2.50×)"],
        ["| CPU, 32 × 128", "3,200 [3,200, 3,200] ms (0.50×)", "1,280 [1,280, 1,280] ms (1.25×)"],
    ]
    assert report.latency_table() in report.to_markdown()


def test_a_name_does_not_break_the_table(report: Report) -> None:
    teacher = replace(report.models[0], name="a|b")
    assert "| teacher (a\\|b) |" in replace(report, models=(teacher, *report.models[1:])).table()
    student = replace(report.models[1], role="a|b")
    named = replace(report, models=(report.models[0], student))
    assert named.latency_table().startswith("| batch × tokens | teacher | a\\|b |\n")
    assert named.guesses_table().startswith("|  | teacher | a\\|b |\n")


def test_texts_and_tokens_are_code(report: Report) -> None:
    tokens = ("<s>", "|", "*", "`", ",")
    teacher = replace(report.models[0], guesses=(tuple(Guess(token, 0.2) for token in tokens),))
    conditions = replace(report.conditions, fill_mask=("__init__\nis <mask> or |",))
    table = replace(report, models=(teacher,), conditions=conditions).guesses_table()
    text, guesses = table.splitlines()[-1].removeprefix("| ").removesuffix(" |").split(" | ")
    assert text == r"`__init__ is <mask> or \|`"
    assert guesses == r"`<s>` 20 %, `\|` 20 %, `*` 20 %, `` ` `` 20 %, `,` 20 %"


def test_the_folder_contains_numbers_table_conditions_and_plot(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]
    found = json.loads((tmp_path / "report.json").read_text())
    student = found["models"][1]
    assert (student["mlm_retention_percent"], student["latencies"][0]["speed_up"]) == (90.0, 2.5)
    assert [(each["batch_size"], each["length"]) for each in student["latencies"]] == [
        (1, 32),
        (1, 128),
        (32, 128),
    ]
    assert (student["fp32_megabytes"], student["fp16_megabytes"]) == (8.0, 4.0)
    assert student["quality"] == {
        "loss": 2.5,
        "accuracy": 0.45,
        "masked_tokens": 100,
        "training_masks_loss": 3.25,
        "training_masks_accuracy": 0.225,
    }
    assert student["tasks"][0]["scores"] == {"accuracy": [0.7, 0.9]}
    markdown = (tmp_path / "report.md").read_text()
    assert report.table() in markdown
    (task,) = found["conditions"]["tasks"]
    assert (task["metrics"], task["majority_accuracy"]) == (["accuracy"], 0.55)
    for condition in (
        "rte: accuracy",
        "64 tokens",
        "drawn uniformly",
        f"threads on the CPU: {torch.get_num_threads()}",
        "2 seeds",
        "learning rate 5e-05",
        "55.0 %",
        torch.__version__,
    ):
        assert condition in markdown
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_works_without_tasks_baseline_and_retention(report: Report, tmp_path: Path) -> None:
    bare = [replace(model, tasks=(), retention_percent=None) for model in report.models[:2]]
    write_report(replace(report, models=tuple(bare)), tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_the_plot_has_a_labelled_point_per_model_and_device(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu = [
        replace(
            model,
            latencies=(
                *model.latencies,
                *(replace(each, device="GPU", median_ms=each.median_ms / 10) for each in model.latencies),
            ),
        )
        for model in report.models
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_report(replace(report, models=tuple(with_gpu)), tmp_path / "report.png")
    _, _, *panels = drawn[0].axes
    assert [axes.get_xlabel() for axes in panels] == [
        f"{device} latency in ms, 1 × 128 tokens" for device in ("CPU", "GPU")
    ]
    for axes, scale in zip(panels, (1.0, 0.1), strict=True):
        assert axes.get_ylabel() == "masked accuracy in %"
        points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in axes.lines}
        assert points == {(20.0 * scale, 50.0), (8.0 * scale, 45.0), (8.0 * scale, 25.0)}
        assert {text.get_text().strip() for text in axes.texts} == {"teacher", "student", "baseline"}


def test_labels_of_equal_models_do_not_cover_each_other(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = report.models[1]
    same = (report.models[0], student, *(replace(student, role=role) for role in ("second", "third")))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_report(replace(report, models=same), tmp_path / "report.png")
    axes = drawn[0].axes[-1]
    drawn[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
