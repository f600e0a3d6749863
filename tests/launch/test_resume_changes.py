"""The changes that --resume accepts: other settings of the optimiser, more steps. Recorded settings are those in use.

Plain SGD, because its update is proportional to learning rate and gradient. The third step always starts from the same
weights and rows, and differs only by its settings.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher import train_all, training_options, write_config
from safetensors.torch import load_file
from training import CPU_HAS_FP16

from distilspeed.trainer.engine.schedules import learning_rates
from distilspeed.trainer.training.metrics import read_metrics
from distilspeed.trainer.training.record import read_record

pytestmark = pytest.mark.full

BATCH, MICRO_BATCH, STEPS, LEARNING_RATE = 8, 4, 2, 0.01
SECONDS = 1200
LOWER = 0.1 * LEARNING_RATE
# Stages 2 and 3 use the same optimiser in all precisions; half precision is slow on CPUs.
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (3, "fp32")]
if CPU_HAS_FP16:
    CASES.insert(5, (1, "fp16"))
MOVED = (1, 3)  # to two ranks, by ZeRO stage
SCHEDULES: dict[
    str, tuple[int, dict[str, Any], dict[str, Any]]
] = {  # ZeRO stage, parameters, those that change
    "WarmupDecayLR": (
        1,
        {"warmup_max_lr": "auto", "warmup_num_steps": 2, "warmup_type": "linear", "total_num_steps": 8},
        {},
    ),
    "OneCycle": (
        2,
        {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 4, "cycle_momentum": False},
        {"cycle_max_lr": 2e-3},
    ),
    "ExponentialLR": (0, {"gamma": 0.5}, {}),
}
SGD = {
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "scheduler": None,
    "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
}
DECAY, CLIPPING = 0.5, 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path) -> Path:
    """All runs: two steps, then copies that take a third step, with the same settings and with others."""
    folder = tmp_path_factory.mktemp("changes")
    first: list[dict[str, Any]] = []
    again: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def run(name: str, config: dict[str, Any], steps: int, **more: Any) -> dict[str, Any]:
        config = {key: value for key, value in config.items() if value is not None}
        removed = tuple(key for key in ("scheduler",) if key not in config)
        return (
            training_options(
                tiny_teacher_dir,
                small_corpus_dir,
                folder / name,
                deepspeed_config=write_config(folder / f"{name}.json", config, removed),
                max_steps=steps,
                train_batch_size=BATCH,
                per_device_train_batch_size=MICRO_BATCH,
            )
            | more
        )

    def extended(name: str, to: str, config: dict[str, Any], ranks: int = 1, **more: Any) -> None:
        again[ranks].append(
            run(f"{name}_{to}", config, STEPS + 1, resume=True, **more) | {"copied_from": name}
        )

    for stage, precision in CASES:
        name = f"zero{stage}_{precision}"
        config = {**SGD, "zero_optimization": {"stage": stage}}
        if precision != "fp32":
            config[precision] = {"enabled": True}
        if precision == "fp16":
            config["fp16"]["initial_scale_power"] = 8
        first.append(run(name, config, STEPS))
        extended(name, "same", config)
        lower = {**config, "optimizer": {"type": "SGD", "params": {"lr": LOWER}}}
        extended(name, "lower", lower)
        if precision == "fp32":
            decay = {"type": "SGD", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY}}
            changed = {**config, "optimizer": decay, "gradient_clipping": CLIPPING}
            extended(name, "changed", changed)
    for kind, (stage, params, changed) in SCHEDULES.items():
        config = {
            **SGD,
            "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
            "zero_optimization": {"stage": stage},
            "scheduler": {"type": kind, "params": params},
        }
        has_own_rates = kind == "OneCycle"  # then --learning_rate is refused
        rate, lower_rate = (
            {} if has_own_rates else {"learning_rate": each} for each in (LEARNING_RATE, LOWER)
        )
        first.append(run(kind, config, STEPS, **rate))
        first.append(run(f"{kind}_straight", config, STEPS + 1, **rate))
        extended(kind, "same", config)  # "auto" keeps its value
        lower = {**config, "scheduler": {"type": kind, "params": params | changed}}
        extended(kind, "lower", lower, **lower_rate)
    adam = {"lr": LEARNING_RATE, "torch_adam": True, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}

    def adams(stage: int, **changed: Any) -> dict[str, Any]:
        optimizer = {"type": "AdamW", "params": adam | changed}
        zero = {"stage": stage}
        return {
            "scheduler": None,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,
            "optimizer": optimizer,
        }

    for stage in MOVED:
        name = f"adam{stage}"
        first.append(run(name, adams(stage), STEPS))
        extended(name, "same", adams(stage))
        extended(name, "moved", adams(stage, lr=LOWER), ranks=2)
    extended("adam1", "betas", adams(1, betas=[0.0, 0.0], eps=1e-12))

    train_all(folder, first, 1, SECONDS)
    for run_again in (*again[1], *again[2]):
        shutil.copytree(folder / run_again.pop("copied_from"), run_again["output_dir"])
    for ranks in (1, 2):
        shown = train_all(folder, again[ranks], ranks, SECONDS).stdout
        (folder / f"printed_{ranks}.txt").write_text(shown)
    return folder


def weights(run: Path, without: tuple[str, ...] = ()) -> torch.Tensor:
    student = load_file(run / "student" / "model.safetensors")
    return torch.cat([student[name].flatten() for name in sorted(student) if not name.endswith(without)])


def last_update(folder: Path, name: str, resumed: str, without: tuple[str, ...] = ()) -> torch.Tensor:
    return weights(folder / f"{name}_{resumed}", without) - weights(folder / name, without)


def off_by(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_the_next_step_uses_a_lower_learning_rate(folder: Path, stage: int, precision: str) -> None:
    name = f"zero{stage}_{precision}"
    lower, same = last_update(folder, name, "lower"), last_update(folder, name, "same")
    if stage == 0 and precision != "fp32":  # stage 0 exports rounded weights, which hardly change
        assert lower.norm() < 0.7 * same.norm()
    else:
        assert off_by(lower, LOWER / LEARNING_RATE * same) < 1e-3
    assert [line.lr for line in read_metrics(folder / f"{name}_lower" / "metrics.jsonl")] == [
        LEARNING_RATE,
        LEARNING_RATE,
        LOWER,
    ]


@pytest.mark.parametrize("stage", MOVED)
def test_the_next_step_uses_it_on_another_number_of_ranks(folder: Path, stage: int) -> None:
    # Softmax ignores biases of keys: their gradients are rounding errors, which Adam scales up to ordinary updates.
    moved, same = (
        last_update(folder, f"adam{stage}", resumed, without=("k_lin.bias",)) for resumed in ("moved", "same")
    )
    assert off_by(moved, LOWER / LEARNING_RATE * same) < 1e-4


@pytest.mark.parametrize("stage", range(4))
def test_weight_decay_and_clipping_come_from_the_new_config(folder: Path, stage: int) -> None:
    name = f"zero{stage}_fp32"
    same = last_update(folder, name, "same")
    norm = read_metrics(folder / f"{name}_same" / "metrics.jsonl")[-1].grad_norm
    assert norm is not None
    expected = same * CLIPPING / norm - LEARNING_RATE * DECAY * weights(folder / name)
    assert off_by(last_update(folder, name, "changed"), expected) < 1e-3


def test_adams_betas_come_from_the_new_config(folder: Path) -> None:
    # With betas of 0 Adam forgets earlier steps, and changes every weight by the learning rate.
    update = last_update(folder, "adam1", "betas").abs()
    # Embeddings of tokens that are not in the batch do not change.
    assert update[update > 0].median().item() == pytest.approx(LEARNING_RATE, rel=1e-3)
    assert update.max().item() <= LEARNING_RATE * 1.001


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_continues_with_its_new_peak(folder: Path, kind: str) -> None:
    record = read_record(folder / f"{kind}_lower")
    assert record
    expected = list(learning_rates(record.started.deepspeed_config, STEPS + 1))
    same, lower = (
        [line.lr for line in read_metrics(folder / f"{kind}_{name}" / "metrics.jsonl")]
        for name in ("same", "lower")
    )
    assert lower[:STEPS] == same[:STEPS]
    assert lower[STEPS] == pytest.approx(expected[STEPS])
    assert lower[STEPS] < same[STEPS]
    moved = last_update(folder, kind, "lower"), last_update(folder, kind, "same")
    assert off_by(moved[0], lower[STEPS] / same[STEPS] * moved[1]) < 1e-3


@pytest.mark.parametrize("kind", SCHEDULES)
def test_an_extended_run_equals_one_of_as_many_steps(folder: Path, kind: str) -> None:
    extended, straight = folder / f"{kind}_same", folder / f"{kind}_straight"
    assert torch.equal(weights(extended), weights(straight))
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (extended, straight))
    assert [line.step for line in ours] == [1, 2, 3]
    assert [(line.loss, line.lr, line.tokens) for line in ours] == [
        (line.loss, line.lr, line.tokens) for line in theirs
    ]


def test_changes_are_printed_once_recorded_and_in_the_model_card(folder: Path) -> None:
    run = folder / "zero1_fp32_lower"
    shown = f"after step 2: optimizer.params.lr {LEARNING_RATE} -> {LOWER}, total_steps 2 -> 3"
    assert (folder / "printed_1.txt").read_text().count(f"changed {shown}\n") == len(CASES) + 1
    content = json.loads((run / "train_config.json").read_text())
    assert content["changes"] == [
        {"after_step": 2, "changed": {"optimizer.params.lr": [LEARNING_RATE, LOWER], "total_steps": [2, 3]}}
    ]
    # The record of the start is unchanged.
    assert content["deepspeed_config"]["optimizer"]["params"]["lr"] == LEARNING_RATE
    assert (content["identity"]["total_steps"], content["student_step"]) == (2, 3)
    card = (run / "student" / "README.md").read_text()
    assert f"| Optimiser | SGD {{'lr': {LOWER}}} |" in card
    assert f"| Changed | {shown} |" in card
    assert "in 3 steps" in card
    assert not list(run.glob("student.*"))
