"""Which optimiser a run takes: the fastest that this machine has of the one that the DeepSpeed config names."""

import logging
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.optim import Optimizer
from torch.utils.cpp_extension import CUDA_HOME, _get_build_directory, is_ninja_available

from distilspeed.trainer.engine.apex import find_apex
from distilspeed.trainer.engine.config import ADAM_TYPES, AUTO, LAMB_TYPE, DeepSpeedConfig, ResolvedConfig
from distilspeed.trainer.engine.lamb import Lamb
from distilspeed.trainer.errors import UserError, first_line

logger = logging.getLogger(__name__)

SECONDS_OF_BUILD = 900.0  # more than any of DeepSpeed's Adams takes to compile
SECONDS_BETWEEN_LOOKS = 1.0
TRUST_RATIO_LIMITS = {"max_coeff", "min_coeff"}


def choose_optimizer(
    config: ResolvedConfig, device: torch.device, has_deepspeed_adam: bool = False
) -> ResolvedConfig:
    """Fill ``"torch_adam": "auto"`` and ``"fused": "auto"`` of a DeepSpeed config.

    ``torch_adam`` becomes false where DeepSpeed's own Adam can run: FusedAdam on a GPU, CPUAdam for optimiser
    states offloaded from one. On a CPU device it becomes true: DeepSpeed would compile for minutes, and torch's
    fused step of 66 million float32 parameters takes 0.04 s on 2 cores (0.22 s unfused; November 2026).
    """
    params = _adam_params(config)
    if not {"torch_adam", "fused"} & params.keys():
        return config
    if params.get("torch_adam") == AUTO:
        params["torch_adam"] = not has_deepspeed_adam
    if not params.get("torch_adam"):
        params.pop("fused", None)  # DeepSpeed's know no such parameter: they are fused
    elif params.get("fused") == AUTO:
        params["fused"] = device.type in ("cuda", "cpu")
    return config.with_sections(optimizer=config.section("optimizer") | {"params": params})


def settle_optimizer(config: ResolvedConfig, device: torch.device, local_rank: int) -> ResolvedConfig:
    """Choose the optimiser for the whole job; called by every rank, when the ranks have joined.

    One rank of each host builds the operator that it needs, then the others load it. Where a rank cannot, all take
    torch's Adam: with another on each host they would add up different updates.

    Raises:
        UserError: the operator that the config asks for cannot be built, or waits for a build that was killed.
    """
    wanted = _adam_params(config).get("torch_adam", False)
    if (
        config.optimizer_kind not in ADAM_TYPES
        or wanted is True
        or (wanted == AUTO and device.type != "cuda")
    ):
        return choose_optimizer(config, device)
    builder, compiler = _builder_and_compiler(config, device)
    obstacle, obstacles = "", [""] * torch.distributed.get_world_size()
    for is_turn in (local_rank == 0, local_rank != 0):
        if is_turn:
            obstacle = _obstacle(builder, compiler)
        torch.distributed.all_gather_object(obstacles, obstacle)  # which waits for those whose turn it is
    rank, obstacle = next(((rank, each) for rank, each in enumerate(obstacles) if each), (0, ""))
    if obstacle and wanted != AUTO:
        raise UserError(
            "failed-build",
            f"DeepSpeed's {builder.name} cannot be built on rank {rank}: {obstacle}; "
            'set "torch_adam": "auto" in the optimizer\'s "params", or mend that',
        )
    if obstacle and torch.distributed.get_rank() == 0:
        logger.info(
            "DeepSpeed's %s cannot be built on rank %d, torch's AdamW is used: %s",
            builder.name,
            rank,
            obstacle,
        )
    return choose_optimizer(config, device, has_deepspeed_adam=not obstacle)


def _adam_params(config: DeepSpeedConfig) -> dict[str, Any]:
    if config.optimizer is None or config.optimizer_kind not in ADAM_TYPES:
        return {}
    return dict(config.optimizer.params)


def _builder_and_compiler(config: DeepSpeedConfig, device: torch.device) -> tuple[OpBuilder, str | None]:
    """What DeepSpeed builds its Adam with."""
    if config.offload_optimizer:
        return CPUAdamBuilder(), shutil.which("c++")
    if device.type != "cuda":
        return FusedAdamBuilder(), shutil.which("c++")
    return FusedAdamBuilder(), shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None


def _obstacle(builder: OpBuilder, compiler: str | None) -> str:
    """Load the operator as DeepSpeed is about to: prebuilt, or compiled now and kept for the next run.

    Returns:
        why it cannot be loaded; "" where it was.
    """
    if not installed_ops.get(builder.name, False):
        if not (compiler and is_ninja_available()):
            return "there is no compiler for it, or no ninja"
        _wait_for_build(builder.name)
    try:
        builder.load()
    except Exception as error:  # versions that do not go together, a compiler's or a linker's complaint
        return first_line(error)
    return ""


def _wait_for_build(name: str) -> None:
    """Wait for the lock of another process's build, for which torch itself would wait for ever."""
    lock = Path(_get_build_directory(name, verbose=False)) / "lock"
    has_told = False
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > SECONDS_OF_BUILD:
            raise UserError(
                "failed-build",
                f"{lock} is {age / 60:.0f} minutes old: the build of DeepSpeed's {name} that made it was killed; "
                "delete it if no build runs",
            )
        if not has_told:
            logger.info("waiting for another build of DeepSpeed's %s; if none runs, delete %s", name, lock)
            has_told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)


def own_optimizer(config: DeepSpeedConfig, device_type: str) -> Callable[[Any], Optimizer] | None:
    """What makes the optimiser from the parameters, where the trainer and not DeepSpeed does: for Lamb; else None.

    It is apex's FusedLAMB on a GPU where NVIDIA's apex is installed and the config limits no trust ratio (apex
    cannot), else :class:`Lamb`: the same step either way.

    Raises:
        UserError: an apex that is not NVIDIA's is installed where it would be used.
    """
    if config.optimizer is None or config.optimizer_kind != LAMB_TYPE:
        return None
    params = config.optimizer.params
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
