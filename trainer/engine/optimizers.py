"""Choose the fastest implementation of the DeepSpeed config's optimiser that this machine supports."""

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

SECONDS_OF_BUILD = 900.0  # longer than any Adam of DeepSpeed takes to compile
SECONDS_BETWEEN_LOOKS = 1.0
TRUST_RATIO_LIMITS = {"max_coeff", "min_coeff"}


def choose_optimizer(
    config: ResolvedConfig, device: torch.device, has_deepspeed_adam: bool = False
) -> ResolvedConfig:
    """Fill ``"torch_adam": "auto"`` and ``"fused": "auto"`` of a DeepSpeed config.

    ``torch_adam`` becomes false if DeepSpeed's own Adam can run: FusedAdam on a GPU, or CPUAdam for optimiser
    states offloaded to the CPU. On a CPU device it becomes true: compiling DeepSpeed's Adam takes minutes, and
    torch's fused step over 66 million float32 parameters takes 0.04 s on 2 cores (0.22 s unfused; November 2026).
    """
    params = _adam_params(config)
    if not {"torch_adam", "fused"} & params.keys():
        return config
    if params.get("torch_adam") == AUTO:
        params["torch_adam"] = not has_deepspeed_adam
    if not params.get("torch_adam"):
        params.pop("fused", None)  # DeepSpeed's Adams are always fused and do not have this parameter
    elif params.get("fused") == AUTO:
        params["fused"] = device.type in ("cuda", "cpu")
    return config.with_sections(optimizer=config.section("optimizer") | {"params": params})


def settle_optimizer(config: ResolvedConfig, device: torch.device, local_rank: int) -> ResolvedConfig:
    """Choose one optimiser for all ranks; called by every rank, after the ranks have joined.

    One rank per host builds DeepSpeed's operator, then the others load it. If a rank cannot, all ranks use torch's
    Adam: different implementations on different ranks would compute different updates.

    Raises:
        UserError: the operator that the config requires cannot be built, or its build lock is stale.
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
        torch.distributed.all_gather_object(obstacles, obstacle)  # waits for the ranks whose turn it is
    rank, obstacle = next(((rank, each) for rank, each in enumerate(obstacles) if each), (0, ""))
    if obstacle and wanted != AUTO:
        raise UserError(
            "failed-build",
            f"DeepSpeed's {builder.name} cannot be built on rank {rank}: {obstacle}; "
            'set "torch_adam": "auto" in the optimizer\'s "params", or fix the build',
        )
    if obstacle and torch.distributed.get_rank() == 0:
        logger.info(
            "DeepSpeed's %s cannot be built on rank %d, using torch's AdamW: %s",
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
    """Return DeepSpeed's builder of its Adam, and the compiler that it needs; None if that is missing."""
    if config.offload_optimizer:
        return CPUAdamBuilder(), shutil.which("c++")
    if device.type != "cuda":
        return FusedAdamBuilder(), shutil.which("c++")
    return FusedAdamBuilder(), shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else None


def _obstacle(builder: OpBuilder, compiler: str | None) -> str:
    """Load the operator as DeepSpeed will: prebuilt, or compiled now and cached for the next run.

    Returns:
        why the operator cannot be loaded; "" if it was loaded.
    """
    if not installed_ops.get(builder.name, False):
        if not (compiler and is_ninja_available()):
            return "no compiler or no ninja was found"
        _wait_for_build(builder.name)
    try:
        builder.load()
    except Exception as error:  # incompatible versions, or an error of the compiler or linker
        return first_line(error)
    return ""


def _wait_for_build(name: str) -> None:
    """Wait for another process's build; torch would wait forever if that process was killed."""
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
                f"{lock} is {age / 60:.0f} minutes old: the build of DeepSpeed's {name} that created it was killed; "
                "delete it if no build is running",
            )
        if not has_told:
            logger.info(
                "waiting for another build of DeepSpeed's %s; if none is running, delete %s", name, lock
            )
            has_told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)


def own_optimizer(config: DeepSpeedConfig, device_type: str) -> Callable[[Any], Optimizer] | None:
    """Return a function that makes the optimiser from the parameters; None if DeepSpeed makes it (all but Lamb).

    Lamb is apex's FusedLAMB on a GPU if NVIDIA apex is installed and the config does not limit the trust ratio,
    which apex does not support. Otherwise it is :class:`Lamb`. Both compute the same step.

    Raises:
        UserError: the unrelated package apex is installed, and NVIDIA's would be used.
    """
    if config.optimizer is None or config.optimizer_kind != LAMB_TYPE:
        return None
    params = config.optimizer.params
    limited = TRUST_RATIO_LIMITS & params.keys()
    apex = find_apex() if device_type == "cuda" and not limited else None
    if apex is None or apex.fused_lamb is None:
        return partial(Lamb, **params)
    # By default apex clips gradients to norm 1 and applies no trust ratio without weight decay. DeepSpeed clips
    # already, and max_grad_norm=0 would set every gradient to 0.
    return partial(apex.fused_lamb, **params, max_grad_norm=math.inf, use_nvlamb=True)


def forget_dummy_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Undo the step with zero gradients that DeepSpeed takes to initialise an optimiser's states.

    DeepSpeed takes this step in half precision without ZeRO. Adam and Lamb would count the step, which makes Adam's
    first updates 10 to 50 % too small. With weight decay the step also changes the float32 copies of the weights.
    """
    if engine.zero_optimization_stage() == 0:
        engine.basic_optimizer.state.clear()
        for group in engine.basic_optimizer.param_groups:
            group.pop("step", None)
        if engine.optimizer is not engine.basic_optimizer:
            engine.optimizer.refresh_fp32_params()


def describe_fused_parts(engine: deepspeed.DeepSpeedEngine) -> str:
    """Return one line about the optimiser and the layer norms that the engine actually runs."""
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
