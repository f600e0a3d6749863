"""The student's DeepSpeed engine, its backward pass and step, and a check of the device's precision."""

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
# Below this compute capability torch emulates bfloat16, which is slow.
OLDEST_BF16_CAPABILITY = (8, 0)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a UserError if the device cannot train in ``precision``, or if DeepSpeed is too old."""
    if Version(deepspeed.__version__) < OLDEST_DEEPSPEED:
        raise UserError(
            "wrong-package",
            f"DeepSpeed {deepspeed.__version__} scales gradients wrongly; install deepspeed>={OLDEST_DEEPSPEED}",
        )
    if device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(
            "no-gpu",
            f"rank {device.index} of this host has no GPU: it sees {torch.cuda.device_count()}; start at most one rank "
            "per GPU, and let each rank see all GPUs of the host (under Slurm --gpus-per-node, not --gpus-per-task)",
        )
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "unsupported-precision",
            f'this device ({device}) cannot train in fp16; enable "bf16" in the config, or train in fp32',
        )
    too_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_BF16_CAPABILITY
    if precision == "bf16" and (too_old or not get_accelerator().is_bf16_supported()):
        raise UserError(
            "unsupported-precision",
            f'this device ({device}) cannot train in bf16; enable "fp16" in the config',
        )


def student_engine(module: nn.Module, deepspeed_config: DeepSpeedConfig) -> deepspeed.DeepSpeedEngine:
    """Wrap the student's module in a DeepSpeed engine.

    Raises:
        UserError: DeepSpeed rejects the config.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        # DeepSpeed's bf16 optimiser prints the memory in use.
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
            "bad-config", f"DeepSpeed rejects the config: {error}; correct --deepspeed_config"
        ) from error
    if engine.optimizer is None or not engine.optimizer_name():
        raise UserError("bad-config", 'the DeepSpeed config has no "optimizer"; add one, for example "AdamW"')
    forget_dummy_step(engine)
    apply_first_rate(engine.lr_scheduler)
    return engine


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> None:
    """Compute gradients; in fp16, scale the loss where DeepSpeed does not: it does so only with ZeRO optimisers."""
    if not isinstance(engine.optimizer, ZeROOptimizer):
        loss = loss * loss_scale(engine)
    engine.backward(loss)


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> float | torch.Tensor | None:
    """Advance the engine one micro-step; at the accumulation boundary this updates the parameters.

    Returns:
        the norm of the global batch's gradient before clipping, if a step was taken.

    Raises:
        OverflowAtLowestScale: fp16 gradients overflow at the minimum loss scale.
    """
    norm = None
    # In fp32 without ZeRO the optimiser is torch's own, and DeepSpeed does not store the norm.
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
    # FP16_UnfusedOptimizer stores the norm of the scaled gradient.
    return norm / scale if isinstance(engine.optimizer, FP16_UnfusedOptimizer) and norm is not None else norm


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> float:
    """Return the current fp16 loss scale; 1 in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
