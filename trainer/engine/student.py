"""DeepSpeed: the processes, the student's engine; what the device can do, checked first."""

import contextlib
import io

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from packaging.version import Version
from torch import nn

from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.optimizers import forget_dummy_step, own_optimizer
from distilspeed.trainer.engine.schedules import apply_first_rate
from distilspeed.trainer.errors import OverflowAtLowestScale, UserError

# Older versions divide gradients by the accumulation steps once per output tensor of the module.
OLDEST_DEEPSPEED = Version("0.19.8")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Below this compute capability torch emulates bfloat16, slowly.
OLDEST_BF16_CAPABILITY = (8, 0)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a UserError if the device cannot train in ``precision``, or DeepSpeed is too old to train at all."""
    if Version(deepspeed.__version__) < OLDEST_DEEPSPEED:
        raise UserError(
            "wrong-package",
            f"DeepSpeed {deepspeed.__version__} scales gradients wrongly; install deepspeed>={OLDEST_DEEPSPEED}",
        )
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(
            "no-gpu",
            f"rank {device.index} of this host has no GPU: it sees {torch.cuda.device_count()}; start no more ranks "
            "than GPUs, and let each see all of the host's (under Slurm --gpus-per-node, not --gpus-per-task)",
        )
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "unsupported-precision",
            f'this device ({device}) cannot train in fp16; enable "bf16" in the config, or neither',
        )
    too_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_BF16_CAPABILITY
    if precision == "bf16" and (too_old or not get_accelerator().is_bf16_supported()):
        raise UserError(
            "unsupported-precision", f'this device ({device}) has no bf16; enable "fp16" in the config'
        )


def student_engine(module: nn.Module, deepspeed_config: DeepSpeedConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap the student's module; parameters, gradients and optimiser states are laid out as the config says.

    Raises:
        UserError: DeepSpeed refuses the config.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        # Its optimiser for bf16 prints the memory in use.
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=parameters,
                config=deepspeed_config.to_dict(),
                optimizer=own_optimizer(deepspeed_config, get_accelerator().device_name()),
            )
    except (
        deepspeed.DeepSpeedConfigError,
        ValueError,
        AssertionError,
        TypeError,
        NotImplementedError,
    ) as error:
        raise UserError(
            "bad-config", f"DeepSpeed refuses the config: {error}; correct --deepspeed_config"
        ) from error
    if engine.optimizer is None or not engine.optimizer_name():
        raise UserError(
            "bad-config", 'the DeepSpeed config names no "optimizer"; give it one, for example "AdamW"'
        )
    forget_dummy_step(engine)
    apply_first_rate(engine.lr_scheduler)
    return engine


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> None:
    """Compute gradients, in fp16 of the scaled loss: DeepSpeed scales it for its ZeRO optimisers alone."""
    if not isinstance(engine.optimizer, ZeROOptimizer):
        loss = loss * loss_scale(engine)
    engine.backward(loss)


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> float | torch.Tensor | None:
    """Advance the engine one micro-step; at the accumulation boundary this updates the parameters.

    Returns:
        the norm of the global batch's gradient before clipping, where a step was taken.

    Raises:
        OverflowAtLowestScale: fp16 gradients overflow, and the loss scale is at its minimum.
    """
    norm = None
    # In fp32 without ZeRO the optimizer is torch's own, and DeepSpeed keeps no norm.
    plain = engine.zero_optimization_stage() == 0 and not (engine.fp16_enabled() or engine.bfloat16_enabled())
    if plain and engine.is_gradient_accumulation_boundary():
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    scale = loss_scale(engine)
    try:
        engine.step()
    except Exception as error:  # DeepSpeed raises no other kind
        if "loss scale already at minimum" in str(error):
            raise OverflowAtLowestScale(scale) from error
        raise
    if plain:
        return norm
    norm = engine.get_global_grad_norm()
    # Which keeps the norm of the scaled gradient.
    return norm / scale if isinstance(engine.optimizer, FP16_UnfusedOptimizer) and norm is not None else norm


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """The fp16 loss scale in force; 1 in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
