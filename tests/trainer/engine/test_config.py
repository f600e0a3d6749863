"""The batch equation, "auto" values and the checks on arguments."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, DistilBertConfig
from user_errors import raises_user_error

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import DeepSpeedConfig, ResolvedConfig
from distilspeed.trainer.engine.config_auto import Started, resolve_deepspeed_config
from distilspeed.trainer.engine.config_batch import resolve_batch_equation
from distilspeed.trainer.engine.config_file import read_deepspeed_config
from distilspeed.trainer.engine.optimizers import choose_optimizer
from distilspeed.trainer.engine.schedules import learning_rates
from distilspeed.trainer.engine.teacher import teacher_config
from distilspeed.trainer.errors import UserErrorCode
from distilspeed.trainer.models.flops import model_shape
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.memory import GIB, estimate_memory
from distilspeed.trainer.training.plan import RESERVE_BYTES

CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_found_by_its_name(path: Path) -> None:
    assert read_deepspeed_config(Path(path.stem)).to_dict() == json.loads(path.read_text())


def test_a_file_comes_before_the_shipped_config_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu_bf16").mkdir()  # a folder, not a file
    assert read_deepspeed_config(Path("gpu_bf16")).precision == "bf16"
    (tmp_path / "cpu").write_text('{"gradient_clipping": 1.0}')
    assert read_deepspeed_config(Path("cpu")).to_dict() == {"gradient_clipping": 1.0}


@pytest.mark.parametrize("path", ["v100", "nowhere/cpu", "cpu.json"])
def test_an_unknown_name_is_refused_and_the_shipped_ones_are_listed(path: str) -> None:
    with raises_user_error("unreadable-config", path, "cpu, gpu_bf16, v100x8_fp16, zero3_offload"):
        read_deepspeed_config(Path(path))


@pytest.mark.parametrize(
    ("stated", "world_size", "expected"),
    [
        ({}, 2, (16, 8, 1, 2)),
        ({"train_batch_size": 4096, "train_micro_batch_size_per_gpu": 16}, 8, (4096, 16, 32, 8)),
        ({"train_batch_size": 64}, 2, (64, 32, 1, 2)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 4}, 2, (64, 8, 4, 2)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, 2, (24, 4, 3, 2)),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 4}, 1, (4, 4, 1, 1)),
    ],
)
def test_the_batch_equation_is_solved_as_deepspeed_solves_it(
    stated: dict[str, Any], world_size: int, expected: tuple[int, ...]
) -> None:
    assert resolve_batch_equation(DeepSpeedConfig(stated), world_size) == BatchEquation(*expected)


def test_arguments_fill_the_batch_sizes_that_the_config_does_not_state() -> None:
    assert resolve_batch_equation(DeepSpeedConfig({}), 2, 64, 8) == BatchEquation(64, 8, 4, 2)
    with raises_user_error("conflicting-config", "--train_batch_size 64", '"train_batch_size": 32', '"auto"'):
        resolve_batch_equation(DeepSpeedConfig({"train_batch_size": 32}), 2, 64, 8)


def batch(total: int, micro: int) -> DeepSpeedConfig:
    return DeepSpeedConfig({"train_batch_size": total, "train_micro_batch_size_per_gpu": micro})


def test_an_indivisible_batch_is_refused_and_the_nearest_divisible_ones_are_named() -> None:
    with raises_user_error("indivisible-batch", "4096", "4080 and 4104"):
        resolve_batch_equation(batch(4096, 8), 3)
    with raises_user_error("indivisible-batch", "5", "24"):
        resolve_batch_equation(batch(5, 8), 3)
    with raises_user_error("indivisible-batch", "32", "24"):
        resolve_batch_equation(batch(32, 8).with_sections(gradient_accumulation_steps=3), 1)


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_an_invalid_batch_size_is_refused(value: object) -> None:
    with raises_user_error("bad-config", '"train_batch_size"', repr(value)):
        DeepSpeedConfig({"train_batch_size": value})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_resolves_to_the_recipe_of_the_original(path: Path) -> None:
    config = read_deepspeed_config(path)
    equation = resolve_batch_equation(config, 8)
    resolved = resolve_deepspeed_config(config, equation, total_steps=1000, learning_rate=None)
    assert "auto" not in json.dumps(choose_optimizer(resolved, torch.device("cpu")).to_dict())
    assert resolved.gradient_clipping == 5.0
    assert resolved.optimizer
    assert resolved.scheduler
    parameters = resolved.optimizer.params
    assert (parameters["lr"], parameters["betas"], parameters["eps"]) == (5e-4, [0.9, 0.98], 1e-6)
    schedule = resolved.scheduler.params
    # The rate reaches 0 in the step after the last.
    assert (schedule["warmup_num_steps"], schedule["total_num_steps"]) == (50, 1001)
    assert schedule["warmup_max_lr"] == 5e-4


AUTO_SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": dict.fromkeys(
        ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type", "total_num_steps"), "auto"
    ),
    "WarmupLR": dict.fromkeys(("warmup_max_lr", "warmup_num_steps", "warmup_type"), "auto"),
    "WarmupCosineLR": dict.fromkeys(
        ("warmup_min_ratio", "warmup_num_steps", "warmup_type", "total_num_steps"), "auto"
    ),
}


def filled(name: str, steps: int, **stated: object) -> ResolvedConfig:
    """Return a resolved config whose schedule is "auto" except for the stated values."""
    config = DeepSpeedConfig(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": name, "params": {**AUTO_SCHEDULES[name], **stated}},
        }
    )
    return resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), steps, None)


@pytest.mark.parametrize("steps", [1, 2, 3, 39, 1000])
@pytest.mark.parametrize("name", AUTO_SCHEDULES)
def test_an_auto_schedule_rises_to_the_peak_and_is_never_0(name: str, steps: int) -> None:
    config = filled(name, steps)
    rates = list(learning_rates(config, steps))
    assert min(rates) > 0
    warmup = max(2, round(0.05 * steps))
    rising = range(1, min(warmup, steps + 1))
    assert rates[: len(rising)] == pytest.approx([1e-3 * step / warmup for step in rising])
    rest = {
        "WarmupDecayLR": [
            1e-3 * (steps + 1 - step) / (steps + 1 - warmup) for step in range(warmup, steps + 1)
        ],
        "WarmupLR": [1e-3] * max(0, steps - warmup + 1),
    }
    if name in rest:
        assert rates[len(rising) :] == pytest.approx(rest[name])
    else:
        assert rates[len(rising) :] == sorted(rates[len(rising) :], reverse=True)
        assert all(rate > 0.99e-3 for rate in rates[warmup - 1 : warmup] if steps > 100)


def test_deepspeed_itself_takes_two_steps_at_a_rate_of_0() -> None:
    """The reason for FIRST_ITERATION; if this test fails, remove that constant."""
    config = filled("WarmupDecayLR", 100)
    schedule = config.section("scheduler")
    del schedule["params"]["last_batch_iteration"]
    assert [rate > 0 for rate in learning_rates(config.with_sections(scheduler=schedule), 3)] == [
        False,
        False,
        True,
    ]


def test_a_fully_stated_schedule_is_not_changed() -> None:
    params = {"warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear"}
    assert filled("WarmupLR", 100, **params).section("scheduler")["params"] == params


def test_a_resumed_run_fills_auto_with_the_values_of_its_start() -> None:
    first = filled("WarmupLR", 100).with_sections(
        optimizer={"type": "AdamW", "params": {"lr": 2e-3, "eps": 1e-9}}
    )
    config = DeepSpeedConfig(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto"}},
            "scheduler": {"type": "WarmupLR", "params": AUTO_SCHEDULES["WarmupLR"]},
        }
    )
    batch = BatchEquation(8, 8, 1, 1)
    resumed = resolve_deepspeed_config(config, batch, 1000, None, Started(first, 100))
    assert resumed.section("optimizer")["params"] == {"lr": 2e-3, "eps": 1e-9}
    assert resumed.section("scheduler")["params"] == {
        "warmup_max_lr": 2e-3,
        "warmup_num_steps": 5,
        "warmup_type": "linear",
        "last_batch_iteration": 1,
    }
    lower = resolve_deepspeed_config(config, batch, 100, 1e-4, Started(first, 100))
    assert lower.settings()["optimizer.params.lr"] == 1e-4
    assert lower.settings()["scheduler.params.warmup_max_lr"] == 1e-4


@pytest.mark.parametrize(
    ("precision", "stage", "offload", "expected"),
    [
        ("bf16", 0, "none", None),
        ("bf16", 1, "none", "fp32"),
        ("bf16", 2, "cpu", "fp32"),
        ("bf16", 3, "none", "fp32"),
        ("fp16", 1, "none", "fp32"),
        ("fp16", 2, "cpu", None),
        ("fp16", 3, "cpu", "fp32"),
        ("fp32", 1, "none", None),
    ],
)
def test_half_precision_accumulates_gradients_in_fp32_where_deepspeed_can(
    precision: str, stage: int, offload: str, expected: str | None
) -> None:
    half = {} if precision == "fp32" else {precision: {"enabled": True}}
    zero = {"stage": stage, "offload_optimizer": {"device": offload}}
    config = DeepSpeedConfig({**half, "zero_optimization": zero})
    equation = BatchEquation(8, 8, 1, 1)
    resolved = resolve_deepspeed_config(config, equation, 100, None)
    assert resolved.accumulation_dtype == expected
    assert resolved.accumulates_in_fp32 == ("fp32" in (expected, precision))
    stated = config.with_sections(data_types={"grad_accum_dtype": "bf16"})
    assert resolve_deepspeed_config(stated, equation, 100, None).accumulation_dtype == "bf16"


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.stem != "cpu"], ids=lambda path: path.stem)
def test_the_shipped_half_precision_configs_accumulate_gradients_in_fp32(path: Path) -> None:
    config = read_deepspeed_config(path)
    assert config.precision != "fp32"
    assert config.accumulation_dtype == "fp32"
    assert config.obstacle_to_fp32_accumulation() is None


def test_the_offloading_config_fits_16_gib_and_accumulates_64_micro_batches() -> None:
    config = read_deepspeed_config(next(path for path in CONFIGS if path.stem == "zero3_offload"))
    # If it were on, DeepSpeed would replace torch's linear layer in the whole process, including the teacher.
    assert config.section("zero_optimization")["memory_efficient_linear"] is False
    batch = resolve_batch_equation(config, 1)
    assert batch.gradient_accumulation_steps == 64
    bert = BertConfig()
    student = DistilBertConfig(vocab_size=bert.vocab_size)
    plan = estimate_memory(
        *map(model_shape, (student, bert)),
        batch,
        512,
        resolve_deepspeed_config(config, batch, 1000, None),
    )
    assert plan.total + RESERVE_BYTES < 16 * GIB


def test_the_8_v100_config_accumulates_to_4096_sequences_in_fp16() -> None:
    config = read_deepspeed_config(next(path for path in CONFIGS if path.stem == "v100x8_fp16"))
    assert resolve_batch_equation(config, 8) == BatchEquation(4096, 32, 16, 8)
    assert config.precision == "fp16"


def test_a_stated_value_is_kept_and_an_unsupported_auto_is_refused() -> None:
    config = DeepSpeedConfig(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}},
        }
    )
    resolved = resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), 100, None)
    assert resolved.settings()["optimizer.params.lr"] == 1e-3
    assert resolved.settings()["scheduler.params.warmup_max_lr"] == 1e-3
    with raises_user_error("conflicting-config", "--learning_rate 0.002", '"optimizer.params.lr": 0.001'):
        resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), 100, 2e-3)
    with raises_user_error("bad-config", '"fp16.loss_scale"', '"auto"'):
        resolve_deepspeed_config(
            DeepSpeedConfig({"fp16": {"loss_scale": "auto"}}), BatchEquation(8, 8, 1, 1), 100, None
        )
    with raises_user_error("bad-config", '"zero_optimization.stage"', "auto"):
        DeepSpeedConfig({"zero_optimization": {"stage": "auto"}})


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "named"),
    [
        ({}, None, "no rate"),
        ({"weight_decay": 0.1}, {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "no rate"),
        (
            {"lr": "auto"},
            {"type": "OneCycle", "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}},
            "OneCycle",
        ),
        ({"lr": "auto"}, {"type": "LRRangeTest"}, "LRRangeTest"),
    ],
)
def test_a_learning_rate_without_effect_is_refused(
    optimizer: dict[str, Any], scheduler: dict[str, Any] | None, named: str
) -> None:
    sections = {"optimizer": {"type": "AdamW", "params": optimizer}}
    config = DeepSpeedConfig(sections | ({"scheduler": scheduler} if scheduler else {}))
    with raises_user_error("conflicting-config", "--learning_rate 0.002", named):
        resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), 100, 2e-3)
    resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), 100, None)


def test_a_config_cannot_be_changed() -> None:
    sections: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.98]}}}
    config = DeepSpeedConfig(sections)
    for copy in (sections, config.to_dict(), {"optimizer": config.section("optimizer")}):
        copy["optimizer"]["params"]["betas"][0] = 0.0
    assert config.optimizer
    config.optimizer.params["betas"][0] = 0.0
    assert config.settings()["optimizer.params.betas"] == [0.9, 0.98]
    with pytest.raises(FrozenInstanceError):
        config._raw = {}  # type: ignore[misc]


def test_precision_is_one_of_three() -> None:
    assert DeepSpeedConfig({}).precision == "fp32"
    assert DeepSpeedConfig({"bf16": {"enabled": True}, "fp16": {"enabled": False}}).precision == "bf16"
    old_name = DeepSpeedConfig({"bfloat16": {"enabled": True}})
    assert (old_name.precision, old_name.to_dict()) == ("bf16", {"bf16": {"enabled": True}})
    assert teacher_config(old_name)["bf16"] == {"enabled": True}
    with raises_user_error("conflicting-config", '"fp16"', '"bf16"'):
        DeepSpeedConfig({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    with raises_user_error("bad-config", '"amp"'):
        DeepSpeedConfig({"amp": {"enabled": True}})


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"max_steps": 0}, "bad-argument"),
        ({"num_train_epochs": 0.0}, "bad-argument"),
        ({"seed": -1}, "bad-argument"),
        ({"save_steps": 0}, "bad-argument"),
        ({"learning_rate": -1e-4}, "bad-argument"),
        ({"mlm_smoothing": -0.1}, "bad-argument"),
        ({"mlm_smoothing": 11.0}, "bad-argument"),
        ({"train_batch_size": 0}, "bad-argument"),
        ({"teacher": "none"}, "missing-argument"),
        ({"student": "s", "student_config": "config.json"}, "conflicting-arguments"),
        ({"student": "s", "student_layers": (0, 1)}, "conflicting-arguments"),
        ({"student_config": "config.json", "student_layers": (0, 1)}, "conflicting-arguments"),
        (
            {"teacher": "none", "student_config": "config.json", "student_layers": (0, 1)},
            "conflicting-arguments",
        ),
        (
            {"teacher": "none", "student_config": "config.json", "teacher_zero3": True},
            "conflicting-arguments",
        ),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(wrong: dict[str, Any], code: UserErrorCode) -> None:
    given = {"deepspeed_config": Path("c"), "teacher": "t", "data_dir": Path("d"), "output_dir": Path("o")}
    with raises_user_error(code, f"--{[*wrong][-1]}"):
        TrainArguments(**(given | wrong))
