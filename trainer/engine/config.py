"""The DeepSpeed config as typed objects; the only place that reads its raw dictionary."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.errors import UserError

AUTO = "auto"
PRECISIONS = ("fp32", "fp16", "bf16")
ADAM_TYPES = ("adam", "adamw")
LAMB_TYPE = "lamb"
# DeepSpeed's defaults.
REDUCE_BUCKET_SIZE = 500_000_000  # elements
HYSTERESIS = 2

TRAIN_BATCH_SIZE = "train_batch_size"
MICRO_BATCH_SIZE = "train_micro_batch_size_per_gpu"
ACCUMULATION_STEPS = "gradient_accumulation_steps"
BATCH_KEYS = (TRAIN_BATCH_SIZE, MICRO_BATCH_SIZE, ACCUMULATION_STEPS)


@dataclass(frozen=True)
class Component:
    """The optimiser or the scheduler of a DeepSpeed config."""

    type: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class Offload:
    """Where ZeRO offloads optimiser states or parameters to."""

    device: str
    nvme_path: str | None

    def __bool__(self) -> bool:
        return self.device != "none"


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed config as it was read; values may be "auto".

    Raises:
        UserError: a part that this project reads has the wrong type or value.
    """

    _raw: Mapping[str, Any]

    def __post_init__(self) -> None:
        raw = copy.deepcopy(dict(self._raw))
        if "bfloat16" in raw:  # DeepSpeed's old name
            raw.setdefault("bf16", raw.pop("bfloat16"))
        object.__setattr__(self, "_raw", raw)
        _check_parts(self._raw)

    def to_dict(self) -> dict[str, Any]:
        """Return a copy as the dictionary that DeepSpeed takes and that is recorded."""
        return copy.deepcopy(dict(self._raw))

    def section(self, name: str) -> dict[str, Any]:
        """Return a copy of a section; empty if the config does not have it."""
        return copy.deepcopy(_section(self._raw, name))

    def settings(self) -> dict[str, Any]:
        """Return the values by their paths, such as "optimizer.params.lr"."""
        return settings_of(self.to_dict())

    def with_sections(self, **sections: Any) -> Self:
        """Return the config with new values for these top-level keys."""
        return replace(self, _raw={**self._raw, **sections})

    # --- batch -------------------------------------------------------------------------------------------

    def stated(self, batch_key: str) -> int | None:
        """Return the value of one of :data:`BATCH_KEYS`; None if it is missing or "auto"."""
        value = self._raw.get(batch_key, AUTO)
        return None if value == AUTO else value

    # --- precision ---------------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        """One of :data:`PRECISIONS`."""
        return _precision(self._raw)

    @property
    def hysteresis(self) -> int:
        """The number of fp16 overflows that DeepSpeed tolerates before it lowers the loss scale."""
        return _section(self._raw, "fp16").get("hysteresis", HYSTERESIS)

    @property
    def states_accumulation_dtype(self) -> bool:
        return "grad_accum_dtype" in _section(self._raw, "data_types")

    @property
    def accumulation_dtype(self) -> object:
        """The dtype in which gradients are accumulated, as the config states it; None if it does not."""
        return _section(self._raw, "data_types").get("grad_accum_dtype")

    @property
    def accumulates_in_fp32(self) -> bool:
        """Whether gradients are accumulated in fp32."""
        dtype = self.accumulation_dtype or self.precision
        return dtype in ("fp32", "float32", "float", "torch.float32")

    def obstacle_to_fp32_accumulation(self) -> str | None:
        """Return why DeepSpeed 0.19.8 cannot accumulate half-precision gradients in fp32; None if it can."""
        if self.zero_stage == 0:
            return "DeepSpeed does not accumulate in fp32 at ZeRO stage 0"
        if self.precision == "fp16" and self.zero_stage < 3 and self.offload_optimizer:
            # An infinite gradient stays in the sum on the CPU, so every later batch counts as an overflow.
            return (
                f"with offload_optimizer at ZeRO stage {self.zero_stage}, DeepSpeed never recovers from an fp16 "
                "overflow"
            )
        return None

    # --- ZeRO --------------------------------------------------------------------------------------------

    @property
    def zero_stage(self) -> int:
        return self._zero.get("stage", 0)

    @property
    def offload_optimizer(self) -> Offload:
        return self._offload("offload_optimizer")

    @property
    def offload_param(self) -> Offload:
        return self._offload("offload_param")

    @property
    def allows_untested_optimizer(self) -> bool:
        """Whether the config allows optimisers that DeepSpeed has not tested with ZeRO."""
        return bool(self._raw.get("zero_allow_untested_optimizer", False))

    @property
    def reduce_bucket_size(self) -> int:
        """The size of a gradient reduction bucket, in elements."""
        return self._zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)

    @property
    def overlap_comm(self) -> bool:
        return bool(self._zero.get("overlap_comm"))

    @property
    def _zero(self) -> dict[str, Any]:
        return _section(self._raw, "zero_optimization")

    def _offload(self, name: str) -> Offload:
        section = self._zero.get(name) or {}
        return Offload(str(section.get("device", "none")), section.get("nvme_path"))

    # --- optimiser and schedule --------------------------------------------------------------------------

    @property
    def optimizer(self) -> Component | None:
        return self._component("optimizer")

    @property
    def optimizer_kind(self) -> str:
        """The optimiser's type in lower case, as DeepSpeed compares it; "" if there is no optimiser."""
        return self.optimizer.type.lower() if self.optimizer else ""

    @property
    def scheduler(self) -> Component | None:
        return self._component("scheduler")

    @property
    def gradient_clipping(self) -> float | None:
        """The norm that gradients are clipped to; None if the config does not state it."""
        return self._raw.get("gradient_clipping")

    def _component(self, name: str) -> Component | None:
        if name not in self._raw:
            return None
        section = self.section(name)
        return Component(section["type"], section.get("params", {}))


@dataclass(frozen=True)
class ResolvedConfig(DeepSpeedConfig):
    """A config without "auto", and its batch equation.

    The implementation of Adam may still be "auto": the ranks choose it together after they join
    (``settle_optimizer``).
    """

    batch: BatchEquation


def settings_of(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested object by their paths."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= (
            settings_of(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return found


def no_meaning_of_auto(name: str) -> UserError:
    return UserError("bad-config", f'"{name}" in the DeepSpeed config does not support "auto"; set a value')


def _check_parts(raw: Mapping[str, Any]) -> None:
    """Raise a UserError if a part that this file reads has the wrong type or value."""
    for name in ("fp16", "bf16"):
        if not isinstance(_section(raw, name).get("enabled", False), bool):
            raise UserError("bad-config", f'"{name}.enabled" in the DeepSpeed config must be true or false')
    for name in ("optimizer", "scheduler"):
        section = _section(raw, name)
        _section(section, "params", name)
        if name in raw and not (section.get("type") and isinstance(section["type"], str)):
            raise UserError(
                "bad-config", f'"{name}" in the DeepSpeed config has no "type"; add one, see ds_configs/'
            )
    _check_zero(_section(raw, "zero_optimization"))
    _section(raw, "data_types")
    for name in BATCH_KEYS:
        value = raw.get(name, AUTO)
        if value != AUTO and (type(value) is not int or value < 1):
            raise UserError(
                "bad-config",
                f'"{name}" in the DeepSpeed config is {value!r}; it must be an integer above 0 or "auto"',
            )
    _precision(raw)


def _check_zero(zero: Mapping[str, Any]) -> None:
    stage = zero.get("stage", 0)
    if stage == AUTO:
        raise no_meaning_of_auto("zero_optimization.stage")
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(
            "bad-config",
            f'"zero_optimization.stage" in the DeepSpeed config is {stage!r}; choose 0, 1, 2 or 3',
        )
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) is not None:
            _section(zero, name, "zero_optimization")


def _precision(raw: Mapping[str, Any]) -> str:
    if "amp" in raw:
        raise UserError("bad-config", '"amp" in the DeepSpeed config is not supported; use "fp16" or "bf16"')
    enabled = [name for name in ("fp16", "bf16") if _section(raw, name).get("enabled", False)]
    if len(enabled) == 2:
        raise UserError(
            "conflicting-config", 'the DeepSpeed config enables both "fp16" and "bf16"; choose one'
        )
    return enabled[0] if enabled else "fp32"


def _section(raw: Mapping[str, Any], name: str, within: str = "") -> dict[str, Any]:
    section = raw.get(name, {})
    if not isinstance(section, dict):
        path = f"{within}.{name}".lstrip(".")
        raise UserError(
            "bad-config", f'"{path}" in the DeepSpeed config is {section!r}; it must be an object'
        )
    return section
