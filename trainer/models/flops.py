"""FLOPs of a training step, counted from the models' shapes, and the FLOP/s that a device reaches."""

import torch
from transformers import PreTrainedConfig

from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.families.shape import FLOPS_PER_MULTIPLY_ADD, ModelShape
from distilspeed.trainer.models.timing import seconds_of

# Backward computes two matrix products for each one of forward.
TRAINING_OVER_FORWARD = 3


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """Read the sizes from a Hugging Face config, whatever its architecture calls them."""
    return family_of(config).shape(config)


def flops_per_token(
    student: ModelShape, teacher: ModelShape | None, seq_length: int, head_share: float = 1.0
) -> float:
    """FLOPs of one training step per token of a row: student forward and backward, teacher forward.

    ``head_share``: of the tokens, those that pass through the MLM heads.
    """
    flops = TRAINING_OVER_FORWARD * student.forward_flops_per_token(seq_length, head_share)
    return flops + (teacher.forward_flops_per_token(seq_length, head_share) if teacher else 0.0)


SECONDS_TO_MEASURE = 2.0


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device now: the denominator of MFU.

    A measured peak holds on any device; a table of data-sheet peaks does not.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = [seconds_of(lambda: a @ b, device)]
    # A CPU without bf16 arithmetic takes 6 seconds for one such product.
    while len(seconds) < 5 and sum(seconds) < SECONDS_TO_MEASURE:
        seconds.append(seconds_of(lambda: a @ b, device))
    return FLOPS_PER_MULTIPLY_ADD * size**3 / min(seconds)
