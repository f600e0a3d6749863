"""The ablation's report: differences are between runs with the same seed."""

import json
from pathlib import Path

import pytest
import torch

from distilspeed.trainer.evaluation.ablation import (
    ACCURACY,
    FULL,
    TASK_MEAN,
    AblationReport,
    VariantResult,
    variants,
    with_task_mean,
    write_ablation,
)
from distilspeed.trainer.evaluation.report import Environment
from distilspeed.trainer.evaluation.tasks.task import FineTuning, TaskConditions


def scores(masked: float, rte: float, sst2: float) -> dict[str, float]:
    return dict(with_task_mean({ACCURACY: masked, "rte": rte, "sst2": sst2}))


@pytest.fixture
def report() -> AblationReport:
    return AblationReport(
        teacher=(scores(0.5, 0.7, 0.9), scores(0.5, 0.7, 0.9)),
        results=(
            VariantResult("full", "all losses", (scores(0.4, 0.6, 0.8), scores(0.44, 0.66, 0.8))),
            VariantResult(
                "without_ce", "without soft targets", (scores(0.3, 0.5, 0.8), scores(0.34, 0.6, 0.8))
            ),
        ),
        max_steps=10,
        tokens=12345,
        seconds=7200.0,
        tasks=(TaskConditions("rte", ("accuracy",), 100, 20, FineTuning(3, 5e-5, 32, 128)),),
        task_learning_rates=(1e-4, 2e-4),
        task_precision="bf16",
        machine=Environment.here(torch.device("cpu")),
    )


def test_each_variant_leaves_out_one_thing() -> None:
    names = [variant.name for variant in variants("masked")]
    assert names == [
        *("full", "without_ce", "without_mlm", "without_cos", "random_weights"),
        *("no_teacher", "no_teacher_from_layers", "untrained"),
    ]
    causal = [variant.name for variant in variants("causal")]
    assert causal == [name.replace("mlm", "clm") for name in names]
    assert variants("masked")[0] is FULL
    assert (
        len(
            {(each.flags, each.has_teacher, each.from_layers, each.is_trained) for each in variants("masked")}
        )
        == 8
    )


def test_the_table_has_differences_with_the_same_seed(report: AblationReport) -> None:
    heading, _, teacher, full, without = report.table().splitlines()
    assert heading == f"|  | {ACCURACY} | rte | sst2 | {TASK_MEAN} |"
    assert teacher == "| teacher | 50.0 ± 0.0 | 70.0 ± 0.0 | 90.0 ± 0.0 | 80.0 ± 0.0 |"
    # Retention is the share of the means: 0.42 of 0.5.
    assert full.startswith("| all losses | 42.0 ± 2.8 (84.0 %) | 63.0 ± 4.2 (90.0 %) |")
    assert without == "| without soft targets | -10.0 ± 0.0 | -8.0 ± 2.8 | +0.0 ± 0.0 | -4.0 ± 1.4 |"


def test_one_seed_has_no_deviation_and_one_task_no_mean(report: AblationReport) -> None:
    assert with_task_mean({ACCURACY: 0.5, "rte": 0.7}) == {ACCURACY: 0.5, "rte": 0.7}
    one = VariantResult("without_ce", "without", (scores(0.3, 0.5, 0.8),))
    full = VariantResult("full", "all losses", (scores(0.4, 0.6, 0.8),))
    changed = AblationReport(**{**vars(report), "results": (full, one), "teacher": report.teacher[:1]})
    assert changed.table().splitlines()[-1] == "| without | -10.0 | -10.0 | +0.0 | -5.0 |"


def test_the_files_have_numbers_conditions_and_plot(report: AblationReport, tmp_path: Path) -> None:
    write_ablation(report, tmp_path)
    assert json.loads((tmp_path / "ablation.json").read_text())["results"][1]["scores"][0]["rte"] == 0.5
    text = (tmp_path / "ablation.md").read_text()
    assert "12,345 tokens in 10 steps" in text
    assert "2.0 hours" in text
    assert (
        "fine-tuned with AdamW in bf16:\n\n- rte: accuracy; 3 epochs, learning rate the best on dev of "
        in text
    )
    assert (
        "0.0001, 0.0002 for each model and seed, batch 32, at most 128 tokens; 100 training and 20 dev"
        in text
    )
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
