"""Whether DeepSpeed understands all of a config: it ignores a misspelt key, and meets many a wrong value only later."""

import contextlib
import difflib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, KeysView, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.monitor.utils import (
    check_comet_availability,
    check_tb_availability,
    check_wandb_availability,
)
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from pydantic import ValidationError
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distilspeed.trainer.engine.config import PRECISIONS, cannot_accumulate_in_fp32, resolve_precision
from distilspeed.trainer.engine.lamb import Lamb
from distilspeed.trainer.engine.optimizers import ADAM_TYPES, LAMB_TYPE, apply_first_rate, optimizer_type
from distilspeed.trainer.errors import UserError, first_line

# Read by deepspeed.initialize before it makes a DeepSpeedConfig.
READ_BY_INITIALIZE = ("sequence_parallel_size", "data_parallel_size")
# What the engine itself takes out of an Adam's parameters.
ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")
# The parameters whose values torch's AdamW checks for the optimisers that only an engine can make.
ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay")
# How much of a schedule is looked through for a rate above 0.
STEPS_TO_LOOK_AT = 10_000
# How DeepSpeed's monitors import what they need, and what brings it.
MONITOR_PACKAGES = {
    "tensorboard": (check_tb_availability, "distilspeed[monitors]"),
    "wandb": (check_wandb_availability, "distilspeed[monitors]"),
    "comet": (check_comet_availability, "comet_ml>=3.41.0"),
}
WRITING_MONITORS = ("tensorboard", "csv_monitor")
SMALLEST = {"gradient_clipping": 0, "steps_per_print": 1, "gradient_predivide_factor": 1e-6}


def check_deepspeed_config(config: Mapping[str, Any], total_steps: int) -> None:
    """Raise a UserError unless DeepSpeed reads every key of a resolved config and can use every value.

    The known keys are those that DeepSpeed asks for while it reads this very config.

    Args:
        total_steps: optimiser steps of the run, for its schedule.
    """
    # DeepSpeed works out the global batch, whose world size it may not know yet.
    watched = _Watched({name: value for name, value in config.items() if name != "train_batch_size"})
    try:
        with _quiet():
            DeepSpeedConfig(watched)
    except ValidationError as error:
        raise _invalid(error, watched.last) from error
    except Exception as error:  # whatever the value it did not expect led to
        raise UserError(
            "bad-config",
            f'DeepSpeed cannot read "{watched.last}" in its config: {first_line(error)}; correct the value',
        ) from error
    _check_all_was_read(watched, "", READ_BY_INITIALIZE)
    for name, section in watched.items():
        # One that was asked for nothing went as a whole to a model of pydantic's, which refuses unknown keys.
        if isinstance(section, _Watched) and section.asked:
            _check_all_was_read(section, f"{name}.")
    for name, smallest in SMALLEST.items():
        value = config.get(name, smallest)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < smallest:
            raise UserError(
                "bad-config", f'"{name}" in the DeepSpeed config is {value!r}; give a number from {smallest}'
            )
    _check_offload(config)
    _check_accumulation(config)
    if optimizer_type(config):
        _check_optimizer(config)
        if "scheduler" in config:
            _check_scheduler(config, total_steps)


class _Watched(dict[str, Any]):
    """An object of a config that notes the keys it is asked for, each with the default DeepSpeed has for it."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(
            {key: _Watched(value) if isinstance(value, dict) else value for key, value in content.items()}
        )
        self.asked: dict[str, Any] = {}
        self.last = ""

    def _note(self, key: str, default: Any = None) -> None:
        if default is not None or key not in self.asked:
            self.asked[key] = default
        self.last = key

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:  # also where it is unpacked: **section
        for key in super().__iter__():
            self._note(key)
            yield key

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)  # dict's own would look past the methods above

    def __copy__(self) -> "_Watched":
        return self


@contextmanager
def _quiet() -> Iterator[None]:
    """What DeepSpeed and torch have to say they say again when the training starts."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _invalid(error: ValidationError, section: str) -> UserError:
    """The first thing that pydantic found wrong."""
    found = error.errors(include_url=False, include_context=False)[0]
    # The monitors are read together, and their names are part of what pydantic says.
    within = () if section == "comet" else (section,)
    path = ".".join(map(str, (*within, *found["loc"])))
    if found["type"] == "extra_forbidden":
        return UserError("unknown-config-key", _unknown(path, _names_of_models()))
    return UserError(
        "bad-config",
        f'"{path}" in the DeepSpeed config is {found["input"]!r}: {found["msg"]}; correct the value',
    )


def _names_of_models() -> set[str]:
    """The keys of every section that DeepSpeed has a pydantic model of."""
    fields = [
        field for model in DeepSpeedConfigModel.__subclasses__() for field in model.model_fields.items()
    ]
    return {field.alias or name for name, field in fields}


def _unknown(path: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(path.rpartition(".")[2], sorted(known), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "remove it"
    return f'"{path}" in the DeepSpeed config is nothing that DeepSpeed reads; {advice}'


def _check_all_was_read(section: _Watched, prefix: str, also_read: Iterable[str] = ()) -> None:
    known = {*section.asked, *also_read}
    for key, value in section.items():
        if key not in known:
            raise UserError("unknown-config-key", _unknown(f"{prefix}{key}", known))
        default = section.asked.get(key)
        kind: tuple[type, ...] = (bool,) if isinstance(default, bool) else (int, float)
        fits = isinstance(value, kind) and (kind == (bool,) or not isinstance(value, bool))
        if isinstance(default, bool | int | float) and not fits:
            wanted = "true or false" if kind == (bool,) else "a number"
            raise UserError(
                "bad-config", f'"{prefix}{key}" in the DeepSpeed config is {value!r}; it must be {wanted}'
            )


def _check_offload(config: Mapping[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        offload = config.get("zero_optimization", {}).get(name) or {}
        folder = offload.get("nvme_path")
        if offload.get("device") == "nvme" and not (folder and Path(folder).is_dir()):
            raise UserError(
                "bad-config",
                f'"zero_optimization.{name}" in the DeepSpeed config offloads to nvme, and its "nvme_path", '
                f"{folder!r}, is no folder here; make it, or offload to cpu",
            )


def check_monitors(config: Mapping[str, Any]) -> None:
    """Raise a UserError unless the monitors that a config enables can run here; for rank 0, which alone makes them."""
    for name, (import_it, package) in MONITOR_PACKAGES.items():
        try:
            if config.get(name, {}).get("enabled", False):
                with contextlib.redirect_stdout(io.StringIO()):  # where DeepSpeed gives advice of its own
                    import_it()
        except Exception as error:  # whatever a package that does not fit the others raises
            raise UserError(
                "missing-package",
                f'"{name}" is enabled in the DeepSpeed config, and its package cannot be imported '
                f"({first_line(error)}); pip install '{package}', or disable it",
            ) from error
    for name in WRITING_MONITORS:
        section = config.get(name, {})
        folder = Path(section.get("output_path", ""), section.get("job_name", "")).absolute()
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        can_write = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        if section.get("enabled", False) and not can_write:
            raise UserError(
                "unwritable-output",
                f'"{name}.output_path" in the DeepSpeed config: {nearest} is not a directory that can be written; '
                "choose another",
            )


def _check_accumulation(config: Mapping[str, Any]) -> None:
    stated = config.get("data_types", {}).get("grad_accum_dtype")
    if stated is None:
        return
    try:
        dtype = DtypeEnum(stated).value
    except ValueError as error:
        raise UserError(
            "bad-config",
            f'"data_types.grad_accum_dtype" in the DeepSpeed config is {stated!r}; '
            f"choose one of {', '.join(PRECISIONS)}",
        ) from error
    reason = cannot_accumulate_in_fp32(config)
    if dtype == torch.float32 and resolve_precision(config) != "fp32" and reason:
        raise UserError(
            "conflicting-config",
            f'"data_types.grad_accum_dtype" in the DeepSpeed config is "{stated}": {reason}; '
            "remove it, or choose another ZeRO stage",
        )


def _check_optimizer(config: Mapping[str, Any]) -> None:
    params = config["optimizer"].get("params", {})
    made = _optimizer_class(config)
    if made is None:
        return
    switches = ADAM_SWITCHES if optimizer_type(config) in ADAM_TYPES else ()
    known = {*list(inspect.signature(made).parameters)[1:], *switches}
    for key in params:
        if key not in known:
            raise UserError("unknown-config-key", _unknown(f"optimizer.params.{key}", known))
    is_plain = made is Lamb or made.__module__.startswith("torch.")
    try:
        if is_plain:
            given = {key: value for key, value in params.items() if key not in switches}
            made([torch.nn.Parameter(torch.zeros(1))], **given)
        _one_number_optimizer(params)
    except Exception as error:  # whatever the value leads to
        raise UserError(
            "bad-config",
            f'"optimizer.params" in the DeepSpeed config cannot be used: {first_line(error)}; correct the value',
        ) from error
    stage = config.get("zero_optimization", {}).get("stage", 0)
    is_tested = made in ZERO_SUPPORTED_OPTIMIZERS or made is Lamb
    if stage and not is_tested and not config.get("zero_allow_untested_optimizer", False):
        raise UserError(
            "unsupported-optimizer",
            f"DeepSpeed has not been tested with ZeRO and {made.__name__}; "
            'use "AdamW", set "stage": 0, or set "zero_allow_untested_optimizer": true',
        )


def _one_number_optimizer(params: Mapping[str, Any]) -> Optimizer:
    """An AdamW of a single number with the parameters that all Adams have; it refuses senseless ones."""
    given = {key: params[key] for key in ADAM_PARAMS if key in params}
    if "betas" in given:
        _first, _second = given["betas"]
    return AdamW([torch.nn.Parameter(torch.zeros(1))], **given)


def _optimizer_class(config: Mapping[str, Any]) -> type[Optimizer] | None:
    """The class that the engine takes for the optimiser's "type"; None for Muon and those of the package mup."""
    name, kind = config["optimizer"]["type"], optimizer_type(config)
    params = config["optimizer"].get("params", {})
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    is_offloaded = offload.get("device", "none") != "none"
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
    of_torch = _classes(torch.optim, Optimizer)
    if name not in of_torch:
        raise UserError("unsupported-optimizer", _no_type("optimizer", name, ["Lamb", "Lion", *of_torch]))
    return of_torch[name]


def _check_scheduler(config: Mapping[str, Any], total_steps: int) -> None:
    name, params = config["scheduler"].get("type"), config["scheduler"].get("params", {})
    schedules = _schedules()
    if name not in schedules:
        raise UserError("unsupported-scheduler", _no_type("scheduler", name, schedules))
    known = list(inspect.signature(schedules[name]).parameters)[1:]
    for key in params:
        if key not in known:
            raise UserError("unknown-config-key", _unknown(f"scheduler.params.{key}", known))
    kinds = (lr_schedules.WARMUP_LOG_RATE, lr_schedules.WARMUP_LINEAR_RATE)
    if params.get("warmup_type", kinds[0]) not in kinds:
        raise UserError(
            "bad-config",
            f'"scheduler.params.warmup_type" in the DeepSpeed config is {params["warmup_type"]!r}; '
            f"choose {' or '.join(kinds)}",
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if name not in lr_schedules.VALID_LR_SCHEDULES and (stage or resolve_precision(config) != "fp32"):
        raise UserError(
            "unsupported-scheduler",
            f"the scheduler {name} is torch's, which DeepSpeed takes in fp32 at ZeRO stage 0 alone; "
            f"choose one of DeepSpeed's: {', '.join(lr_schedules.VALID_LR_SCHEDULES)}",
        )
    try:
        trains = any(rate > 0 for rate in learning_rates(config, min(total_steps, STEPS_TO_LOOK_AT)))
    except Exception as error:  # whatever the value leads to
        raise UserError(
            "bad-config",
            f'"scheduler.params" in the DeepSpeed config cannot be used: {first_line(error)}; correct the value',
        ) from error
    if not trains:
        raise UserError(
            "unsuitable-schedule",
            f"the scheduler {name} has a learning rate of 0 in all of the {total_steps} steps; "
            'train longer, or set its lengths to "auto"',
        )
    if name == "OneCycleLR" and (length := _one_cycle_steps(params)) < total_steps:
        raise UserError(
            "unsuitable-schedule",
            f"the scheduler OneCycleLR ends after {length} steps, and the run takes {total_steps}; "
            f'set "scheduler.params.total_steps" to {total_steps}',
        )


def learning_rates(config: Mapping[str, Any], steps: int) -> Iterator[float]:
    """The learning rates of a resolved config's first steps, one after the other."""
    optimizer = _one_number_optimizer(config["optimizer"].get("params", {}))
    if "scheduler" not in config:
        for _ in range(steps):
            yield float(optimizer.param_groups[0]["lr"])
        return
    with _quiet():
        scheduler = _schedules()[config["scheduler"]["type"]](
            optimizer, **config["scheduler"].get("params", {})
        )
        apply_first_rate(scheduler)
        for _ in range(steps):
            rate = float(optimizer.param_groups[0]["lr"])
            scheduler.step()
            yield rate


def _schedules() -> dict[str, Any]:
    """Every schedule that an engine finds, by its name."""
    of_deepspeed = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    return _classes(torch.optim.lr_scheduler, LRScheduler) | of_deepspeed


def _one_cycle_steps(params: Mapping[str, Any]) -> int:
    return int(params.get("total_steps") or params["epochs"] * params["steps_per_epoch"])


def _classes(module: Any, kind: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, kind)
    }


def _no_type(section: str, name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), sorted(known), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "see ds_configs/"
    return f'"{section}.type" in the DeepSpeed config is {name!r}, which is no {section} of DeepSpeed\'s; {advice}'
