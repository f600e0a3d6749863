"""Whether DeepSpeed understands all of a config: it ignores a misspelt key, and meets many a wrong value only later."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import deepspeed.runtime.config
import torch
from deepspeed.monitor.utils import (
    check_comet_availability,
    check_tb_availability,
    check_wandb_availability,
)
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ValidationError

from distilspeed.trainer.engine.config import PRECISIONS, TRAIN_BATCH_SIZE, DeepSpeedConfig, ResolvedConfig
from distilspeed.trainer.engine.config_names import unknown_key
from distilspeed.trainer.engine.optimizer_check import check_optimizer, check_scheduler
from distilspeed.trainer.engine.optimizers import choose_optimizer
from distilspeed.trainer.engine.schedules import quiet
from distilspeed.trainer.errors import UserError, first_line

# Read by deepspeed.initialize before it makes a DeepSpeedConfig.
READ_BY_INITIALIZE = ("sequence_parallel_size", "data_parallel_size")
# How DeepSpeed's monitors import what they need, and what brings it.
MONITOR_PACKAGES = {
    "tensorboard": (check_tb_availability, "distilspeed[monitors]"),
    "wandb": (check_wandb_availability, "distilspeed[monitors]"),
    "comet": (check_comet_availability, "comet_ml>=3.41.0"),
}
WRITING_MONITORS = ("tensorboard", "csv_monitor")
SMALLEST = {"gradient_clipping": 0, "steps_per_print": 1, "gradient_predivide_factor": 1e-6}


def check_deepspeed_config(config: ResolvedConfig, total_steps: int) -> None:
    """Raise a UserError unless DeepSpeed reads every key of a resolved config and can use every value.

    Args:
        config: with the Adam that every machine has, where the choice is open.
        total_steps: optimiser steps of the run, for its schedule.
    """
    config = choose_optimizer(config, torch.device("cpu"))
    _check_keys(config)
    _check_smallest(config)
    _check_offload(config)
    _check_accumulation(config)
    check_optimizer(config)
    check_scheduler(config, total_steps)


def _check_keys(config: DeepSpeedConfig) -> None:
    """The known keys are those that DeepSpeed asks for while it reads this very config."""
    # DeepSpeed works out the global batch, whose world size it may not know yet.
    watched = _Watched({name: value for name, value in config.to_dict().items() if name != TRAIN_BATCH_SIZE})
    try:
        with quiet():
            deepspeed.runtime.config.DeepSpeedConfig(watched)
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


def _invalid(error: ValidationError, section: str) -> UserError:
    """The first thing that pydantic found wrong."""
    found = error.errors(include_url=False, include_context=False)[0]
    # The monitors are read together, and their names are part of what pydantic says.
    within = () if section == "comet" else (section,)
    path = ".".join(map(str, (*within, *found["loc"])))
    if found["type"] == "extra_forbidden":
        return unknown_key(path, _names_of_models())
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


def _check_all_was_read(section: _Watched, prefix: str, also_read: Iterable[str] = ()) -> None:
    known = {*section.asked, *also_read}
    for key, value in section.items():
        if key not in known:
            raise unknown_key(f"{prefix}{key}", known)
        default = section.asked.get(key)
        kind: tuple[type, ...] = (bool,) if isinstance(default, bool) else (int, float)
        fits = isinstance(value, kind) and (kind == (bool,) or not isinstance(value, bool))
        if isinstance(default, bool | int | float) and not fits:
            wanted = "true or false" if kind == (bool,) else "a number"
            raise UserError(
                "bad-config", f'"{prefix}{key}" in the DeepSpeed config is {value!r}; it must be {wanted}'
            )


def _check_smallest(config: DeepSpeedConfig) -> None:
    settings = config.to_dict()
    for name, smallest in SMALLEST.items():
        value = settings.get(name, smallest)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < smallest:
            raise UserError(
                "bad-config", f'"{name}" in the DeepSpeed config is {value!r}; give a number from {smallest}'
            )


def _check_offload(config: DeepSpeedConfig) -> None:
    for name, offload in (
        ("offload_optimizer", config.offload_optimizer),
        ("offload_param", config.offload_param),
    ):
        folder = offload.nvme_path
        if offload.device == "nvme" and not (folder and Path(folder).is_dir()):
            raise UserError(
                "bad-config",
                f'"zero_optimization.{name}" in the DeepSpeed config offloads to nvme, and its "nvme_path", '
                f"{folder!r}, is no folder here; make it, or offload to cpu",
            )


def check_monitors(config: DeepSpeedConfig) -> None:
    """Raise a UserError unless the monitors that a config enables can run here; for rank 0, which alone makes them."""
    for name, (import_it, package) in MONITOR_PACKAGES.items():
        try:
            if config.section(name).get("enabled", False):
                with contextlib.redirect_stdout(io.StringIO()):  # where DeepSpeed gives advice of its own
                    import_it()
        except Exception as error:  # whatever a package that does not fit the others raises
            raise UserError(
                "missing-package",
                f'"{name}" is enabled in the DeepSpeed config, and its package cannot be imported '
                f"({first_line(error)}); pip install '{package}', or disable it",
            ) from error
    for name in WRITING_MONITORS:
        section = config.section(name)
        folder = Path(section.get("output_path", ""), section.get("job_name", "")).absolute()
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        can_write = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        if section.get("enabled", False) and not can_write:
            raise UserError(
                "unwritable-output",
                f'"{name}.output_path" in the DeepSpeed config: {nearest} is not a directory that can be written; '
                "choose another",
            )


def _check_accumulation(config: DeepSpeedConfig) -> None:
    stated = config.accumulation_dtype
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
    obstacle = config.obstacle_to_fp32_accumulation()
    if dtype == torch.float32 and config.precision != "fp32" and obstacle:
        raise UserError(
            "conflicting-config",
            f'"data_types.grad_accum_dtype" in the DeepSpeed config is "{stated}": {obstacle}; '
            "remove it, or choose another ZeRO stage",
        )
