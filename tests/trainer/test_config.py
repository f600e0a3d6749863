"""The batch equation, "auto" values and the checks on arguments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distilspeed.trainer.config import (
    BatchEquation,
    TrainArguments,
    read_deepspeed_config,
    resolve_batch_equation,
    resolve_deepspeed_config,
    resolve_precision,
)
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.optimizers import choose_optimizer

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


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
    assert resolve_batch_equation(stated, world_size) == BatchEquation(*expected)


def test_arguments_fill_the_batch_sizes_that_the_config_leaves_open() -> None:
    assert resolve_batch_equation({}, 2, 64, 8) == BatchEquation(64, 8, 4, 2)
    with pytest.raises(UserError, match="contradicts"):
        resolve_batch_equation({"train_batch_size": 32}, 2, 64, 8)


def test_an_indivisible_batch_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(UserError, match="nearest that can: 4080 and 4104"):
        resolve_batch_equation({"train_batch_size": 4096, "train_micro_batch_size_per_gpu": 8}, 3)
    with pytest.raises(UserError, match="nearest that can: 24"):
        resolve_batch_equation({"train_batch_size": 5, "train_micro_batch_size_per_gpu": 8}, 3)
    contradiction = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
    }
    with pytest.raises(UserError, match="= 24"):
        resolve_batch_equation(contradiction, 1)


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_a_batch_size_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="whole number"):
        resolve_batch_equation({"train_batch_size": value}, 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_resolves_to_the_recipe_of_the_original(path: Path) -> None:
    config = choose_optimizer(read_deepspeed_config(path), torch.device("cpu"))
    batch = resolve_batch_equation(config, 8)
    resolved = resolve_deepspeed_config(config, batch, total_steps=1000, learning_rate=None)
    assert "auto" not in json.dumps(resolved)
    assert resolved["gradient_clipping"] == 5.0
    parameters = resolved["optimizer"]["params"]
    assert (parameters["lr"], parameters["betas"], parameters["eps"]) == (5e-4, [0.9, 0.98], 1e-6)
    schedule = resolved["scheduler"]["params"]
    assert (schedule["warmup_num_steps"], schedule["total_num_steps"]) == (50, 1000)
    assert schedule["warmup_max_lr"] == 5e-4


def test_the_8_v100_config_accumulates_to_4096_sequences_in_fp16() -> None:
    config = read_deepspeed_config(next(path for path in CONFIGS if path.stem == "v100x8_fp16"))
    assert resolve_batch_equation(config, 8) == BatchEquation(4096, 32, 16, 8)
    assert resolve_precision(config) == "fp16"


def test_a_stated_value_is_kept_and_a_meaningless_auto_refused() -> None:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": {"params": {"warmup_max_lr": "auto"}},
    }
    resolved = resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), 100, None)
    assert resolved["optimizer"]["params"]["lr"] == resolved["scheduler"]["params"]["warmup_max_lr"] == 1e-3
    with pytest.raises(UserError, match="contradicts"):
        resolve_deepspeed_config(config, BatchEquation(8, 8, 1, 1), 100, 2e-3)
    with pytest.raises(UserError, match=r"zero_optimization\.stage"):
        resolve_deepspeed_config(
            {"zero_optimization": {"stage": "auto"}}, BatchEquation(8, 8, 1, 1), 100, None
        )


def test_precision_is_one_of_three() -> None:
    assert resolve_precision({}) == "fp32"
    assert resolve_precision({"bf16": {"enabled": True}, "fp16": {"enabled": False}}) == "bf16"
    with pytest.raises(UserError, match="choose one"):
        resolve_precision({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    with pytest.raises(UserError, match="amp"):
        resolve_precision({"amp": {"enabled": True}})


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"alpha_ce": -1.0},
        {"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0},
        {"max_steps": 0},
        {"num_train_epochs": 0.0},
        {"seed": -1},
        {"save_steps": 0},
        {"learning_rate": -1e-4},
        {"train_batch_size": 0},
        {"teacher": "none"},
        {"student_config": "config.json"},
        {"teacher": "none", "student_config": "config.json", "student_layers": (0, 1)},
        {"teacher": "none", "student_config": "config.json", "alpha_mlm": 0.0},
        {"teacher": "none", "student_config": "config.json", "teacher_zero3": True},
    ],
    ids=str,
)
def test_senseless_arguments_are_refused(wrong: dict[str, Any]) -> None:
    given = {"deepspeed_config": Path("c"), "teacher": "t", "data_dir": Path("d"), "output_dir": Path("o")}
    with pytest.raises(UserError):
        TrainArguments(**(given | wrong))
