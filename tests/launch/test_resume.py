"""A resumed run equals an uninterrupted one: bitwise on the same number of ranks, within rounding on another."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from jobs import chosen
from launcher import train_all, training_options, write_config
from safetensors.torch import load_file
from training import CPU_HAS_FP16

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.models.loading import load_teacher, make_student, select_teacher_layers
from distilspeed.trainer.training.metrics import read_metrics

STEPS, SAVE_STEPS, BATCH, MICRO_BATCH = 6, 2, 24, 4
CHARACTERS = 17_000  # about 80 rows: an epoch ends in the fourth step
# ZeRO stage, precision, ranks after the resume. fp16 is slow on CPUs.
CASES = [
    (stage, precision, ranks)
    for ranks in (1, 2)
    for stage, precision in [
        *((stage, precision) for stage in range(4) for precision in ("fp32", "bf16")),
        *([(1, "fp16")] if CPU_HAS_FP16 else []),
    ]
]
STRONG_RESUMES, STRONG_MOVES = {(2, "bf16", 2)}, {(1, "fp32", 1)}
# Relative to the weights' total change. Adam divides by the size of gradients, and so amplifies their rounding.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}
# In the first epoch, and after its end.
INTERRUPTED_AT = {"fp32": (2,), "bf16": (4,), "fp16": (2, 4)}


def settings(output: Path, teacher: Path, corpus: Path, stage: int, precision: str) -> dict[str, Any]:
    changes = {"zero_optimization": {"stage": stage}} | {
        name: {"enabled": name == precision} for name in ("fp16", "bf16")
    }
    return training_options(
        teacher,
        corpus,
        output,
        deepspeed_config=write_config(output.with_suffix(".json"), changes),
        max_steps=STEPS,
        train_batch_size=BATCH,
        per_device_train_batch_size=MICRO_BATCH,
        save_steps=SAVE_STEPS,
        save_total_limit=STEPS,
        logging_steps=3,
    )


def interrupted(run: dict[str, Any], folder: Path, at: int) -> dict[str, Any]:
    """Copy a finished run as it was after step ``at``; return the arguments that resume the copy."""
    copy = folder / f"{Path(run['output_dir']).name}_at_{at}"
    shutil.copytree(run["output_dir"], copy)
    shutil.rmtree(copy / "student")
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name[5:]) > at:
            shutil.rmtree(checkpoint)
    return run | {"output_dir": str(copy), "resume": True}


def cases(strong: set[tuple[int, str, int]]) -> list[ParameterSet]:
    return [pytest.param(*case, marks=() if case in strong else pytest.mark.full) for case in CASES]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    dropout_teacher_dir: Path,
    reference_text: Path,
) -> Path:
    """Folders named by number of ranks, with all runs: uninterrupted, resumed, and resumed from the other number."""
    folder, teacher = tmp_path_factory.mktemp("resume"), dropout_teacher_dir
    corpus = folder / "corpus"
    text = folder / "text.txt"
    text.write_text(reference_text.read_text(encoding="utf-8")[:CHARACTERS], encoding="utf-8")
    prepare_corpus(CorpusArguments(tokenizer=str(teacher), text=(text,), output_dir=corpus, seq_length=64))
    rows = open_corpus(corpus).manifest.counts.train_rows
    assert 2 * BATCH < rows < 4 * BATCH

    def straight(stage: int, precision: str, ranks: int) -> dict[str, Any]:
        output = folder / str(ranks) / f"zero{stage}_{precision}"
        return settings(output, teacher, corpus, stage, precision)

    # Ordered by ZeRO stage: after the first run at stage 3 the whole process uses DeepSpeed's linear layer.
    same, moved = (
        sorted(chosen(request, test.__name__, "stage", "precision", "ranks"))
        for test in (
            test_on_the_same_number_of_ranks_resume_is_bitwise_equal,
            test_on_another_number_of_ranks_resume_differs_by_rounding,
        )
    )
    whole = sorted({*same, *((stage, precision, 3 - ranks) for stage, precision, ranks in moved)})
    for ranks in (2, 1):
        (folder / str(ranks)).mkdir()
        if to_train := [straight(*case) for case in whole if case[-1] == ranks]:
            train_all(folder / str(ranks), to_train, ranks)
    for ranks in (2, 1):
        target = folder / f"moved_to_{ranks}"
        target.mkdir()
        again = [
            interrupted(straight(stage, precision, ranks), folder / str(ranks), at)
            for stage, precision, on in same
            if on == ranks
            for at in INTERRUPTED_AT[precision]
        ]
        again += [
            interrupted(straight(stage, precision, 3 - ranks), target, 2)
            for stage, precision, on in moved
            if on == ranks
        ]
        if again:
            train_all(target, again, ranks)
    return folder


def weights(run: Path) -> torch.Tensor:
    """Return all weights of a run's student in one vector."""
    student = load_file(run / "student" / "model.safetensors")
    return torch.cat([student[name].flatten() for name in sorted(student)])


def curve(run: Path) -> list[tuple[object, ...]]:
    lines = read_metrics(run / "metrics.jsonl")
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    return [
        (line.epoch, line.tokens, line.loss, line.losses, line.lr, line.grad_norm,
         line.loss_scale, line.skipped)
        for line in lines
    ]  # fmt: skip


@pytest.mark.parametrize(("stage", "precision", "ranks"), cases(STRONG_RESUMES))
def test_on_the_same_number_of_ranks_resume_is_bitwise_equal(
    runs: Path, stage: int, precision: str, ranks: int
) -> None:
    straight = runs / str(ranks) / f"zero{stage}_{precision}"
    for at in INTERRUPTED_AT[precision]:
        resumed = straight.with_name(f"{straight.name}_at_{at}")
        assert curve(resumed) == curve(straight)
        assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize(("stage", "precision", "ranks"), cases(STRONG_MOVES))
def test_on_another_number_of_ranks_resume_differs_by_rounding(
    runs: Path, dropout_teacher_dir: Path, stage: int, precision: str, ranks: int
) -> None:
    name = f"zero{stage}_{precision}"
    straight, moved = runs / str(3 - ranks) / name, runs / f"moved_to_{ranks}" / f"{name}_at_2"
    ours, theirs = read_metrics(moved / "metrics.jsonl"), read_metrics(straight / "metrics.jsonl")
    assert [line.lr for line in ours] == [line.lr for line in theirs]
    assert [line.tokens for line in ours] == [line.tokens for line in theirs]
    loss_tolerance = 1e-4 if precision == "fp32" else 0.01
    assert [line.loss for line in ours] == pytest.approx([line.loss for line in theirs], rel=loss_tolerance)
    start = weights_at_start(straight, dropout_teacher_dir)
    came = (weights(straight) - start).norm()
    assert (weights(moved) - weights(straight)).norm() < TOLERANCE[precision] * came


def weights_at_start(run: Path, teacher_dir: Path) -> torch.Tensor:
    teacher = load_teacher(str(teacher_dir))
    layers = select_teacher_layers(teacher.config, None)
    student = make_student(teacher, layers).state_dict()
    return torch.cat(
        [student[name].flatten() for name in sorted(load_file(run / "student" / "model.safetensors"))]
    )
