"""A step gives the parameters of plain PyTorch, however the global batch is split.

Plain SGD, because its update is proportional to the gradient: Adam would hide a wrongly scaled gradient. Dropout is 0,
because its random numbers depend on the split.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from jobs import chosen
from launcher import train_all, training_options, write_config
from plain_steps import change, copied_weights, plain_steps
from safetensors.torch import load_file

from distilspeed.trainer.engine.student import DTYPES
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.training.metrics import read_metrics

BATCH, STEPS, LEARNING_RATE, LAYERS = 12, 2, 0.05, (0, 3)
SGD = {
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}
ZERO_1 = {"zero_optimization": {"stage": 1}}
ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
FILLED = {
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "warmup_type": "auto",
            "total_num_steps": "auto",
        },
    }
}
# Ranks, ZeRO stage, micro-batch, precision.
STRONG_CASES = [
    (1, 0, 12, "fp32"),
    (1, 2, 1, "fp32"),
    (2, 1, 3, "fp32"),
    (2, 3, 2, "fp32"),
    (2, 2, 3, "bf16"),
]
CASES = [
    *STRONG_CASES,
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            (1, 0, 3, "fp32"),
            (1, 1, 4, "fp32"),
            (1, 2, 6, "fp32"),
            (1, 3, 4, "fp32"),
            (1, 1, 4, "bf16"),
            (2, 0, 6, "fp32"),
            (2, 0, 2, "fp32"),
            (2, 1, 6, "fp32"),
            (2, 2, 2, "fp32"),
            (2, 3, 6, "fp32"),
            (2, 1, 3, "bf16"),
            (2, 3, 3, "bf16"),
            (1, 0, 4, "fp16"),
            (1, 1, 4, "fp16"),
            (2, 0, 3, "fp16"),
            (2, 2, 3, "fp16"),
        ]
    ),
]
# So many accumulation steps that gradients must be summed in fp32.
LONG_BATCH = 128
HAS_FP16 = get_accelerator().is_fp16_supported()
# Relative to the update's norm. bf16 has 8 bits for each weight and gradient, fp16 11.
LONG_TOLERANCE = 0.01
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.005}


@pytest.fixture(scope="module")
def start(tiny_teacher_dir: Path) -> dict[str, torch.Tensor]:
    return copied_weights(make_student(load_teacher(str(tiny_teacher_dir)), LAYERS))


@pytest.fixture(scope="module")
def expected(tiny_teacher_dir: Path, small_corpus_dir: Path) -> tuple[torch.Tensor, list[float]]:
    """The weights' change in two steps, and the norms of the gradients."""
    return plain_steps(tiny_teacher_dir, small_corpus_dir, LAYERS, BATCH, [LEARNING_RATE] * STEPS)


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
) -> Path:
    """The runs of the cases, one job per number of ranks, one folder per run."""
    folder = tmp_path_factory.mktemp("split")
    # Ordered by ZeRO stage: after the first run at stage 3 the whole process uses DeepSpeed's linear layer.
    cases = sorted(
        chosen(
            request,
            test_same_step_however_the_batch_is_split.__name__,
            "ranks",
            "stage",
            "micro",
            "precision",
        )
    )
    for ranks in (1, 2):
        runs = []
        for case in cases:
            of, stage, micro, precision = case
            if of != ranks or (precision == "fp16" and not HAS_FP16):
                continue
            settings = {
                **SGD,
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": precision == "bf16"},
                "fp16": {"enabled": precision == "fp16", "initial_scale_power": 8},
            }
            output = folder / _name(*case)
            runs.append(_run_arguments(output, settings, tiny_teacher_dir, small_corpus_dir, micro))
        if runs:
            train_all(folder, runs, ranks)
    return folder


@pytest.fixture(scope="module")
def others_trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> Path:
    """Runs with many accumulation steps, with a schedule, and with Adam; one folder per run."""
    folder = tmp_path_factory.mktemp("others")

    def run(name: str, settings: dict[str, Any], micro: int = BATCH, **more: object) -> dict[str, Any]:
        return _run_arguments(folder / name, settings, tiny_teacher_dir, small_corpus_dir, micro) | more

    bf16 = {"bf16": {"enabled": True}}
    runs = [
        run("long", SGD | ZERO_1 | bf16, micro=1, max_steps=1, train_batch_size=LONG_BATCH),
        run("filled_schedule", SGD | FILLED),
        run("adam_zero0", ADAM | {"zero_optimization": {"stage": 0}} | bf16),
        run("adam_zero1", ADAM | ZERO_1 | bf16),
    ]
    train_all(folder, runs, ranks=1)
    return folder


@pytest.mark.parametrize(("ranks", "stage", "micro", "precision"), CASES)
def test_same_step_however_the_batch_is_split(
    trained: Path,
    expected: tuple[torch.Tensor, list[float]],
    start: dict[str, torch.Tensor],
    ranks: int,
    stage: int,
    micro: int,
    precision: str,
) -> None:
    if precision == "fp16" and not HAS_FP16:
        pytest.skip("this CPU has no fp16 arithmetic")
    name = _name(ranks, stage, micro, precision)
    student = load_file(trained / name / "student" / "model.safetensors")
    if precision != "fp32":  # training in half precision starts from the rounded weights
        start = {name: weight.to(DTYPES[precision]).float() for name, weight in start.items()}
    update = change(student, start)
    expected_change, expected_norms = expected
    error = (update - expected_change).norm() / expected_change.norm()
    # Stage 0 exports the rounded weights.
    assert error < (3 if precision == "fp16" and stage == 0 else 1) * TOLERANCE[precision]
    norms = [line.grad_norm for line in read_metrics(trained / name / "metrics.jsonl")]
    assert norms == pytest.approx(expected_norms, rel=TOLERANCE[precision])


@pytest.mark.full
def test_128_accumulation_steps_in_bf16_lose_no_precision(
    others_trained: Path,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    start: dict[str, torch.Tensor],
) -> None:
    rounded = {name: weight.bfloat16().float() for name, weight in start.items()}
    update = change(load_file(others_trained / "long" / "student" / "model.safetensors"), rounded)
    expected, norms = plain_steps(tiny_teacher_dir, small_corpus_dir, LAYERS, LONG_BATCH, [LEARNING_RATE])
    assert (update - expected).norm() < LONG_TOLERANCE * expected.norm()
    (line,) = read_metrics(others_trained / "long" / "metrics.jsonl")
    assert line.grad_norm == pytest.approx(norms[0], rel=LONG_TOLERANCE)


@pytest.mark.full
def test_steps_of_an_auto_schedule_use_the_learning_rates_in_the_metrics(
    others_trained: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, start: dict[str, torch.Tensor]
) -> None:
    # Two steps: half of the peak, and the peak.
    rates = [LEARNING_RATE / 2, LEARNING_RATE]
    metrics = read_metrics(others_trained / "filled_schedule" / "metrics.jsonl")
    assert [line.lr for line in metrics] == pytest.approx(rates)
    update = change(load_file(others_trained / "filled_schedule" / "student" / "model.safetensors"), start)
    expected, _ = plain_steps(tiny_teacher_dir, small_corpus_dir, LAYERS, BATCH, rates)
    assert (update - expected).norm() < TOLERANCE["fp32"] * expected.norm()


@pytest.mark.full
def test_adams_first_updates_are_as_large_without_zero(
    others_trained: Path, start: dict[str, torch.Tensor]
) -> None:
    # DeepSpeed's half-precision optimiser without ZeRO counts an extra step before the first.
    start = {name: weight.bfloat16().float() for name, weight in start.items()}
    without, with_zero = (
        change(load_file(others_trained / f"adam_zero{stage}" / "student" / "model.safetensors"), start)
        .norm()
        .item()
        for stage in (0, 1)
    )
    assert without == pytest.approx(with_zero, rel=0.05)


def _run_arguments(
    output: Path, settings: dict[str, Any], teacher: Path, corpus: Path, micro: int
) -> dict[str, Any]:
    removed = () if "scheduler" in settings else ("scheduler",)
    config = write_config(output.with_suffix(".json"), settings, removed)
    return training_options(
        teacher,
        corpus,
        output,
        deepspeed_config=config,
        student_layers=LAYERS,
        max_steps=STEPS,
        train_batch_size=BATCH,
        per_device_train_batch_size=micro,
    )


def _name(ranks: int, stage: int, micro: int, precision: str) -> str:
    return f"ranks{ranks}_zero{stage}_micro{micro}_{precision}"
