"""A user's own loss: a class and an entry in the registry give it all features of the trainer's own losses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import CPU_CONFIG, python, ranks_alone, training_flags, write_config
from middle_layers_job import MiddleLayers
from refusals import refusal
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
from user_errors import assert_names

from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.objective import registry
from distilspeed.trainer.training.loss_plot import loss_figure, plot_losses
from distilspeed.trainer.training.metrics import StepMetrics, read_metrics

JOB = Path(__file__).with_name("middle_layers_job.py")
STEPS, SAVE_STEPS, WEIGHT = 6, 3, 4.0
OWN = ("own.middle.weight", "own.middle.bias")


def options(teacher: Path, corpus: Path, output: Path, config: Path = CPU_CONFIG) -> list[object]:
    return training_flags(
        teacher,
        corpus,
        output,
        deepspeed_config=config,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        learning_rate=1e-2,
        alpha_middle=WEIGHT,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dropout_teacher_dir: Path, small_corpus_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("own_term") / "run"
    result = ranks_alone(JOB, *options(dropout_teacher_dir, small_corpus_dir, folder), ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def measured(run: Path) -> list[tuple[object, ...]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [(line.step, line.loss, line.losses, line.grad_norm) for line in lines]


def saved(run: Path, step: int) -> dict[str, Any]:
    """Return the weights of the wrapped module in a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:09d}"
    return torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]


def test_its_loss_is_logged_added_to_the_sum_and_falls(run: Path) -> None:
    lines = read_metrics(run / "metrics.jsonl")
    keys = list(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))
    assert keys[3:9] == ["loss", "loss_ce", "loss_mlm", "loss_cos", "loss_middle", "lr"]
    for line in lines:
        weights = {"ce": 5, "mlm": 2, "cos": 1, "middle": WEIGHT}
        weighted = sum(weight * line.losses[name] for name, weight in weights.items())
        assert line.loss == pytest.approx(weighted, rel=1e-5)
    assert 0 < lines[-1].losses["middle"] < 0.9 * lines[0].losses["middle"]


def test_its_weight_is_in_the_runs_identity(
    run: Path,
    dropout_teacher_dir: Path,
    small_corpus_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    identity = json.loads((run / "train_config.json").read_text())["identity"]
    assert (identity["alphas"], identity["alpha_middle"]) == ([5.0, 2.0, 1.0], WEIGHT)
    same = options(dropout_teacher_dir, small_corpus_dir, run)[:-2]
    monkeypatch.setattr(registry, "TERMS", [*registry.TERMS, MiddleLayers])
    for more, now in ((["--alpha_middle", 3], "3.0"), ([], "none")):
        line = refusal("train.py", [*same, *more, "--resume"], run, monkeypatch, capfd)
        assert_names(line, "changed-run", f"alpha_middle {WEIGHT}", now)
    monkeypatch.undo()  # as for a trainer without the term
    line = refusal("train.py", [*same, "--resume"], run, monkeypatch, capfd)
    assert_names(line, "changed-run", f"alpha_middle {WEIGHT}", "none")


def test_its_refusal_ends_a_run_that_sets_its_weight(
    dropout_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(registry, "TERMS", [*registry.TERMS, MiddleLayers])
    command = options(dropout_teacher_dir, small_corpus_dir, tmp_path / "run")
    student = tmp_path / "student"
    make_student(load_teacher(str(dropout_teacher_dir)), (0, 3)).save_pretrained(student)
    shutil.copy(dropout_teacher_dir / "tokenizer.json", student)
    line = refusal("train.py", [*command, "--student", student], tmp_path, monkeypatch, capfd)
    assert_names(line, "conflicting-arguments", f"--alpha_middle {WEIGHT:g}", "teacher's layers")


@pytest.mark.full
def test_its_panel_is_in_the_plot_and_its_line_in_the_model_card(run: Path, tmp_path: Path) -> None:
    metrics = read_metrics(run / "metrics.jsonl")
    terms = [*registry.take_terms({}), MiddleLayers(WEIGHT)]
    titles = [axes.get_title("left") for axes in loss_figure(metrics, terms).axes]
    assert titles[3:5] == ["hidden states, 1 − cosine", "first layers, squared error"]
    plot_losses(metrics, tmp_path / "loss.png", terms)
    assert (tmp_path / "loss.png").read_bytes() == (run / "loss.png").read_bytes()
    card = (run / "student" / "README.md").read_text()
    assert "| First layers | 4 × squared error, through a projection |" in card
    assert f"middle {metrics[-1].losses['middle']:.4f})" in card


def test_its_parameters_are_trained_and_saved_and_not_exported(run: Path, dropout_teacher_dir: Path) -> None:
    before, after = saved(run, SAVE_STEPS), saved(run, STEPS)
    assert [name for name in after if name.startswith("own.")] == list(OWN)
    for name in OWN:
        assert not torch.equal(before[name], after[name])
    exported = load_file(run / "student" / "model.safetensors")
    assert not any("own" in name or "middle" in name for name in exported)
    student = AutoModelForMaskedLM.from_pretrained(run / "student")
    assert (
        student.num_parameters()
        == make_student(load_teacher(str(dropout_teacher_dir)), (0, 3)).num_parameters()
    )


@pytest.mark.full
def test_a_resumed_run_is_bitwise_equal(
    run: Path, dropout_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "student")
    shutil.rmtree(resumed / "checkpoints" / f"step_{STEPS:09d}")
    result = ranks_alone(JOB, *options(dropout_teacher_dir, small_corpus_dir, resumed), "--resume", ranks=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert measured(resumed) == measured(run)
    ours, theirs = saved(resumed, STEPS), saved(run, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.full
def test_the_loss_is_the_same_with_all_weights_sharded_over_two_ranks(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    """Compare ZeRO-3 of student and teacher with a run without sharding."""
    found: list[list[StepMetrics]] = []
    for stage, ranks, more in ((0, 1, []), (3, 2, ["--teacher_zero3"])):
        config = write_config(tmp_path / f"{stage}.json", {"zero_optimization": {"stage": stage}})
        output = tmp_path / f"zero{stage}"
        result = ranks_alone(
            JOB, *options(tiny_teacher_dir, small_corpus_dir, output, config), *more, ranks=ranks
        )
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(read_metrics(output / "metrics.jsonl"))
    for one, other in zip(*found, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-3)
    assert found[1][0].losses["middle"] == pytest.approx(found[0][0].losses["middle"], rel=1e-6)


def test_its_flag_is_in_the_help() -> None:
    assert "weight of the first layers' squared error (default 0)" in " ".join(
        python(JOB, "--help").stdout.split()
    )
