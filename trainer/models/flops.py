"""The FLOPs of a training step, computed from model shapes, and the FLOP/s that a device reaches."""

import logging

import torch
from torch.nn import functional
from transformers import PreTrainedConfig

from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.families.shape import FLOPS_PER_MULTIPLY_ADD, ModelShape
from distilspeed.trainer.models.timing import seconds_of

logger = logging.getLogger(__name__)

# For each matrix product of the forward pass, the backward pass computes two.
TRAINING_OVER_FORWARD = 3


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """Read the sizes of a model from the Hugging Face config of any family."""
    return family_of(config).shape(config)


def flops_per_token(
    student: ModelShape, teacher: ModelShape | None, seq_length: int, head_share: float = 1.0
) -> float:
    """Return the training FLOPs per token: student forward and backward, teacher forward.

    ``head_share``: fraction of tokens that pass through the heads.
    """
    flops = TRAINING_OVER_FORWARD * student.forward_flops_per_token(seq_length, head_share)
    return flops + (teacher.forward_flops_per_token(seq_length, head_share) if teacher else 0.0)


SECONDS_TO_MEASURE = 2.0


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large linear layer on this device: the denominator of MFU.

    A measured peak works on any device; a table of data-sheet peaks does not.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = [seconds_of(lambda: functional.linear(a, b), device)]
    while len(seconds) < 5 and sum(seconds) < SECONDS_TO_MEASURE:
        seconds.append(seconds_of(lambda: functional.linear(a, b), device))
    return FLOPS_PER_MULTIPLY_ADD * size**3 / min(seconds)


def warn_of_slow_bf16(precision: str, device: torch.device) -> None:
    """Warn of bf16 on x86 CPUs without AVX-512, for which oneDNN has no bf16 products.

    On an AMD EPYC with AVX2 the products of the backward pass took 80 times as long as in fp32.
    """
    if precision == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning(
            "this CPU has no AVX-512, so matrix products in bf16 take many times as long as in fp32"
        )
