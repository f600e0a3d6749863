"""What a training run is told: its arguments, and the DeepSpeed config with every "auto" resolved."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.shipped_configs import find_config, shipped_configs
from distilspeed.trainer.errors import UserError

AUTO = "auto"

# The optimiser and schedule of the original DistilBERT; they fill the "auto" values of the config.
LEARNING_RATE = 5e-4
ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-6
WEIGHT_DECAY = 0.0
WARMUP_FRACTION = 0.05
GRADIENT_CLIPPING = 5.0
MICRO_BATCH_SIZE = 8

# The schedules of DeepSpeed's that warm up, and whose length is filled in here.
WARMUP_SCHEDULES = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
# DeepSpeed raises shorter warm-ups to this.
SHORTEST_WARMUP = 2
# Left alone, DeepSpeed takes the first two steps at the warm-up's lowest rate, 0: the first before its schedule has
# begun, the second at iteration 0. Begun at iteration 1, step n has the rate of iteration n.
FIRST_ITERATION = 1

PRECISIONS = ("fp32", "fp16", "bf16")


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed config file (JSON).

    Args:
        path: the file, or the name of a config that ships with the package, such as "cpu".

    Raises:
        UserError: the file is missing, is not JSON, repeats a key or holds a number that is not finite; it holds no
            object, or one of the sections that are read here is none.
    """
    try:
        text = find_config(path).read_text(encoding="utf-8")
        config = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except OSError as error:
        raise UserError(
            "unreadable-config",
            f"cannot read the DeepSpeed config {path}: {error.strerror}; "
            f"give a file, or one that ships: {', '.join(shipped_configs())}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            "unreadable-config", f"the DeepSpeed config {path} is not valid JSON: {error}; see ds_configs/"
        ) from error
    if not isinstance(config, dict):
        raise UserError("bad-config", f"the DeepSpeed config {path} must hold a JSON object; see ds_configs/")
    _check_sections(config)
    return config


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        repeated = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f'"{repeated}" stands twice in one object')
    return section


def _whole(text: str) -> int:
    number = int(text)
    if abs(number) >= 1 << 63:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_sections(config: Mapping[str, Any]) -> None:
    """Raise a UserError unless the parts that this project reads itself have the types it expects."""
    for name in ("fp16", "bf16", "bfloat16"):
        if not isinstance(_section(config, name).get("enabled", False), bool):
            raise UserError("bad-config", f'"{name}.enabled" in the DeepSpeed config must be true or false')
    for name in ("optimizer", "scheduler"):
        section = _section(config, name)
        _section(section, "params", name)
        if name in config and not (section.get("type") and isinstance(section["type"], str)):
            raise UserError(
                "bad-config", f'"{name}" in the DeepSpeed config has no "type"; give it one, see ds_configs/'
            )
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage != AUTO and (type(stage) is not int or not 0 <= stage <= 3):
        raise UserError(
            "bad-config",
            f'"zero_optimization.stage" in the DeepSpeed config is {stage!r}; choose 0, 1, 2 or 3',
        )
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) is not None:
            _section(zero, name, "zero_optimization")


def resolve_batch_equation(
    config: Mapping[str, Any],
    world_size: int,
    train_batch_size: int | None = None,
    per_device_train_batch_size: int | None = None,
) -> BatchEquation:
    """Solve the batch equation from whatever the config and the command line state, as DeepSpeed does.

    A value may come from the config or from the command line (then the config says "auto" or nothing).

    Raises:
        UserError: the stated values contradict each other or do not divide; names the nearest that do.
    """
    total = _stated(config, "train_batch_size", train_batch_size, "--train_batch_size")
    micro = _stated(
        config, "train_micro_batch_size_per_gpu", per_device_train_batch_size, "--per_device_train_batch_size"
    )
    accumulation = _stated(config, "gradient_accumulation_steps", None, "")
    if total is None:
        micro = micro or MICRO_BATCH_SIZE
        accumulation = accumulation or 1
        return BatchEquation(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is None:
        unit = world_size * (accumulation or 1)
        _require_divisible(total, unit, f"{accumulation or 1} accumulation steps x {world_size} ranks")
        micro = total // unit
    if accumulation is None:
        _require_divisible(total, micro * world_size, f"micro-batch {micro} x {world_size} ranks")
        accumulation = total // (micro * world_size)
    if total != micro * accumulation * world_size:
        raise UserError(
            "indivisible-batch",
            f"train_batch_size {total} is not micro-batch {micro} x {accumulation} accumulation steps x {world_size} "
            f'ranks = {micro * accumulation * world_size}; set one of the three to "auto"',
        )
    return BatchEquation(total, micro, accumulation, world_size)


def _stated(config: Mapping[str, Any], key: str, argument: int | None, flag: str) -> int | None:
    value = config.get(key, AUTO)
    if value == AUTO:
        return argument
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            "bad-config",
            f'"{key}" in the DeepSpeed config is {value!r}; it must be a whole number above 0 or "auto"',
        )
    if argument is not None and argument != value:
        raise UserError(
            "conflicting-config",
            f'{flag} {argument} contradicts "{key}": {value} in the DeepSpeed config; set that to "auto"',
        )
    return value


def _require_divisible(total: int, unit: int, product: str) -> None:
    if total % unit:
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = f"{below} and {above}" if below else str(above)
        raise UserError(
            "indivisible-batch",
            f"train_batch_size {total} cannot be divided into {product}; the nearest that can: {nearest}",
        )


def resolve_precision(config: Mapping[str, Any]) -> str:
    """Return "fp16", "bf16" or "fp32", as the config's fp16 and bf16 sections say.

    Raises:
        UserError: both are enabled, or the config asks for amp, which DeepSpeed no longer has.
    """
    if "amp" in config:
        raise UserError("bad-config", '"amp" in the DeepSpeed config is not supported; use "fp16" or "bf16"')
    sections = {"fp16": _section(config, "fp16")}
    sections["bf16"] = _section(config, "bf16" if "bf16" in config else "bfloat16")  # its old name
    enabled = [name for name, section in sections.items() if section.get("enabled", False)]
    if len(enabled) == 2:
        raise UserError(
            "conflicting-config", 'the DeepSpeed config enables both "fp16" and "bf16"; choose one'
        )
    return enabled[0] if enabled else "fp32"


def _section(config: Mapping[str, Any], name: str, within: str = "") -> dict[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        path = f"{within}.{name}".lstrip(".")
        raise UserError(
            "bad-config", f'"{path}" in the DeepSpeed config is {section!r}; it must be an object'
        )
    return section


@dataclass(frozen=True)
class Started:
    """What a run that is resumed has been trained with so far.

    Attributes:
        deepspeed_config: resolved.
        total_steps: that it was to take.
    """

    deepspeed_config: Mapping[str, Any]
    total_steps: int


def resolve_deepspeed_config(
    config: Mapping[str, Any],
    batch: BatchEquation,
    total_steps: int,
    learning_rate: float | None,
    started: Started | None = None,
) -> dict[str, Any]:
    """Fill every "auto" of a DeepSpeed config, as the Hugging Face integration does.

    Args:
        config: as read from the file; not changed.
        batch: the solved batch equation.
        total_steps: optimiser steps of the whole run, for the schedule.
        learning_rate: the peak, where the config says "auto"; None means 5e-4.
        started: of a resumed run, whose "auto" values stay what they were.

    Raises:
        UserError: an "auto" that has no meaning here, or a learning rate that contradicts the config.
    """
    before = settings_of(started.deepspeed_config) if started else {}
    before = {name: value for name, value in before.items() if value is not None}
    stated = settings_of(config)
    for name in ("optimizer.params.lr", "scheduler.params.warmup_max_lr"):
        if learning_rate is not None and stated.get(name, AUTO) not in (AUTO, learning_rate):
            raise UserError(
                "conflicting-config",
                f'--learning_rate {learning_rate} contradicts "{name}": {stated[name]} in the DeepSpeed config; '
                'set that to "auto"',
            )
    peak = learning_rate
    if peak is None:
        peak = stated.get("optimizer.params.lr", AUTO)
    if peak == AUTO:
        peak = before.get("optimizer.params.lr", LEARNING_RATE)
    fill = {
        "gradient_clipping": GRADIENT_CLIPPING,
        "optimizer.params.betas": list(ADAM_BETAS),
        "optimizer.params.eps": ADAM_EPS,
        "optimizer.params.weight_decay": WEIGHT_DECAY,
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_min_ratio": 0.0,
        "scheduler.params.warmup_num_steps": max(SHORTEST_WARMUP, round(WARMUP_FRACTION * total_steps)),
        "scheduler.params.warmup_type": "linear",
        # Where the rate reaches 0: after the last step.
        "scheduler.params.total_num_steps": total_steps + FIRST_ITERATION,
    }
    fill |= {name: before[name] for name in fill if name in before}
    if started and started.total_steps != total_steps:
        fill["scheduler.params.total_num_steps"] = total_steps + FIRST_ITERATION
    fill |= {"optimizer.params.lr": peak, "scheduler.params.warmup_max_lr": peak}
    resolved = _filled(config, fill, "")
    _begin_schedule(config, resolved, before)
    _accumulate_in_fp32(resolved, started)
    # DeepSpeed's waits for the GPU twice a micro-batch; the metrics have the throughput.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    resolved["train_batch_size"] = batch.train_batch_size
    resolved["train_micro_batch_size_per_gpu"] = batch.micro_batch_size
    resolved["gradient_accumulation_steps"] = batch.gradient_accumulation_steps
    return resolved


def settings_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a DeepSpeed config by their paths, such as "optimizer.params.lr"."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= (
            settings_of(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return found


def _begin_schedule(config: Mapping[str, Any], resolved: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Let a warm-up that is filled in here begin above 0, at :data:`FIRST_ITERATION`."""
    params = _section(_section(config, "scheduler"), "params")
    if _section(config, "scheduler").get("type") not in WARMUP_SCHEDULES or AUTO not in params.values():
        return
    first = before.get("scheduler.params.last_batch_iteration") if before else FIRST_ITERATION
    if first is not None:
        resolved["scheduler"]["params"].setdefault("last_batch_iteration", first)


def _accumulate_in_fp32(resolved: dict[str, Any], started: Started | None) -> None:
    """Let half precision sum its micro-batches' gradients in fp32, where the config leaves that open.

    128 micro-batches summed in bf16 are 1.1 to 6.4 % off, in fp16 0.1 to 0.8 % (on a CPU, November 2026).
    """
    types = resolved.get("data_types", {})
    if not isinstance(types, dict) or "grad_accum_dtype" in types or cannot_accumulate_in_fp32(resolved):
        return
    if resolve_precision(resolved) == "fp32":
        return
    if started and "data_types.grad_accum_dtype" not in settings_of(started.deepspeed_config):
        return  # by a version that left it so
    resolved["data_types"] = {**types, "grad_accum_dtype": "fp32"}


def accumulates_in_fp32(config: Mapping[str, Any]) -> bool:
    """Whether a resolved config sums the gradients of micro-batches in fp32."""
    dtype = _section(config, "data_types").get("grad_accum_dtype") or resolve_precision(config)
    return dtype in ("fp32", "float32", "float", "torch.float32")


def cannot_accumulate_in_fp32(config: Mapping[str, Any]) -> str | None:
    """Why DeepSpeed 0.19.8 cannot sum gradients of half precision in fp32; None: it can."""
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage == 0:
        return "DeepSpeed has no such sum at ZeRO stage 0"
    offload = zero.get("offload_optimizer") or {}
    if resolve_precision(config) == "fp16" and stage < 3 and offload.get("device", "none") != "none":
        # An infinite gradient stays in its sum on the CPU, and every later batch counts as one that overflows.
        return (
            f"with offload_optimizer at ZeRO stage {stage} DeepSpeed never recovers from an overflow of fp16"
        )
    return None


_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _filled(section: Mapping[str, Any], fill: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    resolved: dict[str, Any] = {}
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            resolved[key] = _filled(value, fill, f"{name}.")
        elif value == AUTO and name not in _BATCH_KEYS:
            if name not in fill:
                raise UserError(
                    "bad-config", f'"auto" has no meaning for "{name}" in the DeepSpeed config; give a value'
                )
            resolved[key] = fill[name]
        else:
            resolved[key] = value
    return resolved
