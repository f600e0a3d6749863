"""Check that DeepSpeed can create the optimiser and the schedule of a config, and that the run can use them."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch.optim import AdamW, Optimizer

from distilspeed.trainer.engine.config import ADAM_TYPES, LAMB_TYPE, Component, DeepSpeedConfig
from distilspeed.trainer.engine.config_auto import SCHEDULE_LENGTH
from distilspeed.trainer.engine.config_names import unknown_key, unknown_type
from distilspeed.trainer.engine.lamb import Lamb
from distilspeed.trainer.engine.schedules import classes_of, learning_rates, one_number_optimizer, schedules
from distilspeed.trainer.errors import UserError, first_line

# Parameters of Adam that the engine consumes itself.
ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
# How many steps of a schedule are searched for a learning rate above 0.
STEPS_TO_LOOK_AT = 10_000


def check_optimizer(config: DeepSpeedConfig) -> None:
    """Raise a UserError unless the optimiser can be created with its parameters and this ZeRO stage.

    Args:
        config: the resolved config, in which the implementation of Adam is chosen.
    """
    if config.optimizer is None:
        return
    made = _optimizer_class(config.optimizer, bool(config.offload_optimizer))
    if made is None:
        return
    _check_params(made, config)
    _check_stage(made, config)


def _check_params(made: type[Optimizer], config: DeepSpeedConfig) -> None:
    assert config.optimizer is not None
    params = config.optimizer.params
    switches = ADAM_SWITCHES if config.optimizer_kind in ADAM_TYPES else ()
    known = {*list(inspect.signature(made).parameters)[1:], *switches}
    for key in params:
        if key not in known:
            raise unknown_key(f"optimizer.params.{key}", known)
    is_plain = made is Lamb or made.__module__.startswith("torch.")
    try:
        if is_plain:
            given = {key: value for key, value in params.items() if key not in switches}
            made([torch.nn.Parameter(torch.zeros(1))], **given)
        one_number_optimizer(params)
    except Exception as error:  # a wrong value can raise anything
        raise UserError(
            "bad-config",
            f'"optimizer.params" in the DeepSpeed config is invalid: {first_line(error)}; correct the value',
        ) from error


def _check_stage(made: type[Optimizer], config: DeepSpeedConfig) -> None:
    if config.zero_stage == 0:
        return
    if made is Lamb:
        raise UserError(
            "conflicting-config",
            f"Lamb scales the update of each parameter tensor, but ZeRO stage {config.zero_stage} flattens all tensors "
            'into one; set "stage": 0 in the DeepSpeed config, or use AdamW',
        )
    if made not in ZERO_SUPPORTED_OPTIMIZERS and not config.allows_untested_optimizer:
        raise UserError(
            "unsupported-optimizer",
            f"DeepSpeed has not tested {made.__name__} with ZeRO; "
            'use "AdamW", set "stage": 0, or set "zero_allow_untested_optimizer": true',
        )


def _optimizer_class(optimizer: Component, is_offloaded: bool) -> type[Optimizer] | None:
    """Return the class that the engine uses for the optimiser's "type"; None for Muon and optimisers of mup."""
    kind, params = optimizer.type.lower(), optimizer.params
    if kind in ADAM_TYPES and params.get("torch_adam", False):
        return AdamW if kind == "adamw" or params.get("adam_w_mode", True) else torch.optim.Adam
    of_deepspeed: dict[str, type[Optimizer]] = {
        **dict.fromkeys(ADAM_TYPES, DeepSpeedCPUAdam if is_offloaded else FusedAdam),
        "adagrad": DeepSpeedCPUAdagrad if is_offloaded else torch.optim.Adagrad,
        "lion": DeepSpeedCPULion if is_offloaded else FusedLion,
        LAMB_TYPE: Lamb,
    }
    if kind in of_deepspeed:
        return of_deepspeed[kind]
    if kind in DEEPSPEED_OPTIMIZERS:
        return None
    of_torch = classes_of(torch.optim, Optimizer)
    if optimizer.type not in of_torch:
        raise unknown_type("optimizer", optimizer.type, ["Lamb", "Lion", *of_torch])
    return of_torch[optimizer.type]


def check_scheduler(config: DeepSpeedConfig, total_steps: int) -> None:
    """Raise a UserError unless the schedule can be created and has a learning rate for the whole run.

    Args:
        config: the resolved config, whose optimiser is checked.
    """
    scheduler = config.scheduler
    if config.optimizer is None or scheduler is None:
        return
    _check_schedule(scheduler, config)
    try:
        trains = any(rate > 0 for rate in learning_rates(config, min(total_steps, STEPS_TO_LOOK_AT)))
    except Exception as error:  # a wrong value can raise anything
        raise UserError(
            "bad-config",
            f'"scheduler.params" in the DeepSpeed config is invalid: {first_line(error)}; correct the value',
        ) from error
    if not trains:
        raise UserError(
            "unsuitable-schedule",
            f"the scheduler {scheduler.type} has a learning rate of 0 in all {total_steps} steps; "
            'train longer, or set its lengths to "auto"',
        )
    if (length := config.settings().get(SCHEDULE_LENGTH, total_steps)) < total_steps:
        raise UserError(
            "unsuitable-schedule",
            f"the scheduler {scheduler.type} ends after {length} steps, but the run takes {total_steps}; "
            f'set "{SCHEDULE_LENGTH}" to "auto"',
        )
    if scheduler.type == "OneCycleLR" and (length := _one_cycle_steps(scheduler.params)) < total_steps:
        raise UserError(
            "unsuitable-schedule",
            f"the scheduler OneCycleLR ends after {length} steps, but the run takes {total_steps}; "
            f'set "scheduler.params.total_steps" to {total_steps}',
        )


def _check_schedule(scheduler: Component, config: DeepSpeedConfig) -> None:
    name, params = scheduler.type, scheduler.params
    known_schedules = schedules()
    if name not in known_schedules:
        raise unknown_type("scheduler", name, known_schedules)
    known = list(inspect.signature(known_schedules[name]).parameters)[1:]
    for key in params:
        if key not in known:
            raise unknown_key(f"scheduler.params.{key}", known)
    kinds = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
    if params.get("warmup_type", kinds[0]) not in kinds:
        raise UserError(
            "bad-config",
            f'"scheduler.params.warmup_type" in the DeepSpeed config is {params["warmup_type"]!r}; '
            f"choose {' or '.join(kinds)}",
        )
    if name not in lr_schedules.VALID_LR_SCHEDULES and (config.zero_stage or config.precision != "fp32"):
        raise UserError(
            "unsupported-scheduler",
            f"DeepSpeed supports torch's scheduler {name} only in fp32 at ZeRO stage 0; "
            f"choose one of DeepSpeed's: {', '.join(lr_schedules.VALID_LR_SCHEDULES)}",
        )


def _one_cycle_steps(params: Mapping[str, Any]) -> int:
    return int(params.get("total_steps") or params["epochs"] * params["steps_per_epoch"])
