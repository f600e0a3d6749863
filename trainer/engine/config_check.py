"""Check that DeepSpeed understands a config: it ignores misspelt keys and reports many wrong values late."""

import contextlib
import io
import json
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

# deepspeed.initialize reads these before it makes a DeepSpeedConfig.
READ_BY_INITIALIZE = ("sequence_parallel_size", "data_parallel_size")
# For each monitor: DeepSpeed's import check, and the package to install.
MONITOR_PACKAGES = {
    "tensorboard": (check_tb_availability, "distilspeed[monitors]"),
    "wandb": (check_wandb_availability, "distilspeed[monitors]"),
    "comet": (check_comet_availability, "comet_ml>=3.41.0"),
}
WRITING_MONITORS = ("tensorboard", "csv_monitor")
# Settings of DeepSpeed that would change what the trainer's step computes: only these values are supported.
SUPPORTED: dict[str, Any] = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "torch_autocast.enabled": False,
    "fp16.auto_cast": False,
    "checkpoint.load_universal": False,
    "data_efficiency.enabled": False,
    "hybrid_engine.enabled": False,
    "sequence_parallel_size": 1,
    "tensor_parallel.autotp_size": 0,
}
SMALLEST = {"gradient_clipping": 0, "steps_per_print": 1, "gradient_predivide_factor": 1e-6}


def check_deepspeed_config(config: ResolvedConfig, total_steps: int) -> None:
    """Raise a UserError unless DeepSpeed reads every key of a resolved config and can use every value.

    Args:
        config: an Adam that is still "auto" is checked as torch's, which every machine has.
        total_steps: optimiser steps of the run, for its schedule.
    """
    config = choose_optimizer(config, torch.device("cpu"))
    _check_keys(config)
    _check_smallest(config)
    _check_supported(config)
    _check_offload(config)
    _check_accumulation(config)
    check_optimizer(config)
    check_scheduler(config, total_steps)


def _check_keys(config: DeepSpeedConfig) -> None:
    """Raise a UserError for a key that DeepSpeed does not ask for while it reads this config."""
    # Without the global batch, which DeepSpeed would check against a world size that it may not know yet.
    watched = _Watched({name: value for name, value in config.to_dict().items() if name != TRAIN_BATCH_SIZE})
    try:
        with quiet():
            deepspeed.runtime.config.DeepSpeedConfig(watched)
    except ValidationError as error:
        raise _invalid(error, watched.last) from error
    except Exception as error:  # an unexpected value can raise anything
        raise UserError(
            "bad-config",
            f'DeepSpeed cannot read "{watched.last}" in the DeepSpeed config: {first_line(error)}; correct the value',
        ) from error
    _check_all_was_read(watched, "", READ_BY_INITIALIZE)
    for name, section in watched.items():
        # A section without lookups went to a pydantic model, which rejects unknown keys itself.
        if isinstance(section, _Watched) and section.asked:
            _check_all_was_read(section, f"{name}.")


class _Watched(dict[str, Any]):
    """A section of a config that records which keys are read, and with which default."""

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

    def __iter__(self) -> Iterator[str]:  # also used by **section
        for key in super().__iter__():
            self._note(key)
            yield key

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)  # dict.keys would bypass the methods above

    def __copy__(self) -> "_Watched":
        return self


def _invalid(error: ValidationError, section: str) -> UserError:
    """Return the first error that pydantic found, as a UserError."""
    found = error.errors(include_url=False, include_context=False)[0]
    # DeepSpeed reads the monitors together, so pydantic's path has the section's name already.
    within = () if section == "comet" else (section,)
    path = ".".join(map(str, (*within, *found["loc"])))
    if found["type"] == "extra_forbidden":
        return unknown_key(path, _names_of_models())
    return UserError(
        "bad-config",
        f'"{path}" in the DeepSpeed config is {found["input"]!r}: {found["msg"]}; correct the value',
    )


def _names_of_models() -> set[str]:
    """Return the keys of all sections for which DeepSpeed has a pydantic model."""
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
                "bad-config", f'"{name}" in the DeepSpeed config is {value!r}; it must be at least {smallest}'
            )


def _check_supported(config: DeepSpeedConfig) -> None:
    settings = config.settings()
    for name, supported in SUPPORTED.items():
        value = settings.get(name, supported)
        if value != supported:
            raise UserError(
                "bad-config",
                f'"{name}" in the DeepSpeed config is {json.dumps(value)}, and only {json.dumps(supported)} is '
                "supported; remove it",
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
                f'"zero_optimization.{name}" in the DeepSpeed config offloads to nvme, but its "nvme_path", '
                f"{folder!r}, is not a directory on this host; create it, or offload to cpu",
            )


def check_monitors(config: DeepSpeedConfig) -> None:
    """Raise a UserError unless the enabled monitors can run here; for rank 0, the only rank that creates them."""
    for name, (import_it, package) in MONITOR_PACKAGES.items():
        try:
            if config.section(name).get("enabled", False):
                with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its own advice
                    import_it()
        except Exception as error:  # an incompatible package can raise anything
            raise UserError(
                "missing-package",
                f'"{name}" is enabled in the DeepSpeed config, but its package cannot be imported '
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
                f'"{name}.output_path" in the DeepSpeed config: {nearest} is not a writable directory; '
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
