"""Which optimiser a run takes: the fastest that this machine has of the one that the DeepSpeed config names."""

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.optim import Optimizer
from torch.utils.cpp_extension import CUDA_HOME, is_ninja_available

from distilspeed.trainer.apex import find_apex
from distilspeed.trainer.config import AUTO
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.lamb import Lamb

ADAM_TYPES = ("adam", "adamw")
LAMB_TYPE = "lamb"
TRUST_RATIO_LIMITS = {"max_coeff", "min_coeff"}


def choose_optimizer(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Fill ``"torch_adam": "auto"`` and ``"fused": "auto"`` of a DeepSpeed config, and check a Lamb.

    ``torch_adam`` becomes false where DeepSpeed's own Adam can run: FusedAdam on a GPU, CPUAdam for optimiser
    states offloaded from one. On a CPU device it becomes true: DeepSpeed would compile for minutes, and torch's
    fused step of 66 million float32 parameters takes 0.04 s on 2 cores (0.22 s unfused; November 2026).

    Returns:
        the config with both values filled in; ``config`` itself is not changed.

    Raises:
        UserError: Lamb with a ZeRO stage above 0.
    """
    kind = optimizer_type(config)
    if kind == LAMB_TYPE:
        _check_lamb(config)
    params = dict(config.get("optimizer", {}).get("params", {})) if kind in ADAM_TYPES else {}
    if not {"torch_adam", "fused"} & params.keys():
        return dict(config)
    if params.get("torch_adam") == AUTO:
        params["torch_adam"] = not _has_deepspeed_adam(config, device)
    if not params.get("torch_adam"):
        params.pop("fused", None)  # DeepSpeed's know no such parameter: they are fused
    elif params.get("fused") == AUTO:
        params["fused"] = device.type in ("cuda", "cpu")
    return {**config, "optimizer": {**config["optimizer"], "params": params}}


def optimizer_type(config: Mapping[str, Any]) -> str:
    """The optimiser's name in a DeepSpeed config, in lower case as DeepSpeed compares it; "" without one."""
    optimizer = config.get("optimizer")
    return str(optimizer.get("type", "")).lower() if isinstance(optimizer, Mapping) else ""


def _has_deepspeed_adam(config: Mapping[str, Any], device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        return _loads(CPUAdamBuilder(), compiler=shutil.which("c++"))
    nvcc = shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None
    return _loads(FusedAdamBuilder(), compiler=nvcc)


def _loads(builder: OpBuilder, compiler: str | None) -> bool:
    """Load the operator as DeepSpeed is about to: prebuilt, or compiled now and kept for the next run."""
    if not (installed_ops.get(builder.name, False) or (compiler and is_ninja_available())):
        return False
    try:
        builder.load()
    except Exception as error:  # versions that do not go together, a compiler's or a linker's complaint
        print(f"DeepSpeed's {builder.name} cannot be built, torch's AdamW is used: {first_line(error)}")
        return False
    return True


def _check_lamb(config: Mapping[str, Any]) -> None:
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if stage != 0:
        raise UserError(
            f"Lamb scales the update of each parameter tensor, and ZeRO stage {stage} joins all tensors into one; "
            'set "stage": 0 in the DeepSpeed config, or use AdamW'
        )


def own_optimizer(config: Mapping[str, Any], device_type: str) -> Callable[[Any], Optimizer] | None:
    """What makes the optimiser from the parameters, where the trainer and not DeepSpeed does: for Lamb; else None.

    It is apex's FusedLAMB on a GPU where NVIDIA's apex is installed and the config limits no trust ratio (apex
    cannot), else :class:`Lamb`: the same step either way.

    Raises:
        UserError: an apex that is not NVIDIA's is installed where it would be used.
    """
    if optimizer_type(config) != LAMB_TYPE:
        return None
    params = dict(config["optimizer"].get("params", {}))
    limited = TRUST_RATIO_LIMITS & params.keys()
    apex = find_apex() if device_type == "cuda" and not limited else None
    if apex is None or apex.fused_lamb is None:
        return partial(Lamb, **params)
    # Left alone, apex clips gradients to norm 1 (DeepSpeed clips already; 0 would make every gradient 0) and
    # applies no trust ratio without weight decay.
    return partial(apex.fused_lamb, **params, max_grad_norm=math.inf, use_nvlamb=True)


def forget_dummy_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo the step with zero gradients that DeepSpeed takes to fill an optimiser's states.

    It does so in half precision without ZeRO. Adam and Lamb would count it (Adam's first updates would be 10 to 50 %
    too small), and with weight decay it has moved the float32 copies of the weights.
    """
    if engine.zero_optimization_stage() == 0:
        engine.basic_optimizer.state.clear()
        for group in engine.basic_optimizer.param_groups:
            group.pop("step", None)
        if engine.optimizer is not engine.basic_optimizer:
            engine.optimizer.refresh_fp32_params()


def apply_first_rate(scheduler: Any) -> None:
    """Give the first step the rate of a schedule of DeepSpeed's that begins later than before its first iteration.

    DeepSpeed sets rates when such a schedule advances, and so leaves the first step the optimiser's own.
    """
    if getattr(scheduler, "last_batch_iteration", -1) >= 0:
        scheduler.step(scheduler.last_batch_iteration)


def describe_fused_parts(engine: deepspeed.DeepSpeedEngine) -> str:
    """One line on the optimiser and the layer norms that in fact run, read from the engine."""
    optimizer = engine.basic_optimizer
    owner = type(optimizer).__module__.partition(".")[0]
    fused = ", fused" if optimizer.defaults.get("fused") else ""
    norms = sorted(
        {
            f"{type(module).__module__.partition('.')[0]} {type(module).__name__}"
            for module in engine.module.modules()
            if type(module).__name__.endswith("LayerNorm")
        }
    )
    stage = engine.zero_optimization_stage()
    return (
        f"optimiser: {owner} {type(optimizer).__name__}{fused}, ZeRO-{stage}; layer norms: {', '.join(norms)}"
    )
