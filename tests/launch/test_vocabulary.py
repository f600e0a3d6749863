"""A model with more rows than its tokenizer has tokens trains as if it had only the tokens' rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import train_all, training_options
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from vocabularies import GARBAGE, with_rows

from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.training.metrics import read_metrics

TOKENS, ROWS, MORE_ROWS = (
    1000,
    1024,
    1030,
)  # 1000 and 1024 are padded to the same width, 1024, and 1030 is not
STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path) -> Path:
    """The same training with the teacher, the student or both as they are ("plain") or with more rows."""
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
    teacher = load_teacher(str(tiny_teacher_dir))
    student = make_student(teacher, (0, 2))
    for name, model in (
        ("teacher", with_rows(teacher, ROWS)),
        ("student", student),
        ("wider_student", with_rows(student, MORE_ROWS)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    def run(output: str, teacher: Path, **more: object) -> dict[str, Any]:
        return (
            training_options(
                teacher,
                small_corpus_dir,
                folder / output,
                max_steps=STEPS,
                train_batch_size=16,
                per_device_train_batch_size=8,
            )
            | more
        )

    wide, plain = folder / "teacher", tiny_teacher_dir
    student_dir, wider_student = str(folder / "student"), str(folder / "wider_student")
    train_all(
        folder,
        [
            run("layers_plain", plain),
            run("layers", wide),
            run("config_plain", plain, student_config=student_dir),
            run("config", wide, student_config=student_dir),
            run("student_plain", plain, student=student_dir),
            run("student_and_teacher", wide, student=wider_student),
            run("alone_plain", Path("none"), student=str(plain)),
            run("alone", Path("none"), student=str(wide)),
        ],
        ranks=1,
    )
    return folder


def student_of(runs: Path, name: str) -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(runs / name / "student")


def curve(runs: Path, name: str) -> list[tuple[object, ...]]:
    lines = read_metrics(runs / name / "metrics.jsonl")
    return [(line.loss, line.losses, line.grad_norm) for line in lines]


@pytest.mark.parametrize(("name", "rows"), [("layers", ROWS), ("config", TOKENS), ("alone", ROWS)])
def test_losses_gradients_and_student_are_bitwise_those_without_the_rows(
    runs: Path, name: str, rows: int
) -> None:
    assert curve(runs, name) == curve(runs, f"{name}_plain")
    ours, plain = (student_of(runs, run) for run in (name, f"{name}_plain"))
    assert ours.config.vocab_size == rows
    theirs = dict(plain.named_parameters())
    for weight, values in ours.named_parameters():
        assert torch.equal(values[: len(theirs[weight])], theirs[weight]), weight
        assert (values[len(theirs[weight]) :] == GARBAGE).all(), weight


def test_both_models_may_have_more_rows_and_not_the_same_number(runs: Path) -> None:
    for (loss, losses, norm), (plain_loss, plain_losses, plain_norm) in zip(
        curve(runs, "student_and_teacher"), curve(runs, "student_plain"), strict=True
    ):
        assert losses == pytest.approx(plain_losses, rel=1e-5)
        assert (loss, norm) == pytest.approx((plain_loss, plain_norm), rel=1e-5)
    assert student_of(runs, "student_and_teacher").config.vocab_size == MORE_ROWS


@pytest.mark.parametrize("name", ["layers", "alone", "student_and_teacher"])
def test_the_quality_in_the_model_card_leaves_the_rows_out(runs: Path, name: str) -> None:
    plain = "student_plain" if name == "student_and_teacher" else f"{name}_plain"
    lines = [
        [
            line
            for line in (runs / run / "student" / "README.md").read_text().splitlines()
            if "| Held-out" in line
        ]
        for run in (name, plain)
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1


def test_transformers_loads_the_rows(runs: Path) -> None:
    config = json.loads((runs / "layers" / "student" / "config.json").read_text())
    assert config["vocab_size"] == ROWS
    student, loading = AutoModelForMaskedLM.from_pretrained(
        runs / "layers" / "student", output_loading_info=True
    )
    assert not any(loading.values())
    assert student(torch.tensor([[5, 6]])).logits.shape[-1] == ROWS
