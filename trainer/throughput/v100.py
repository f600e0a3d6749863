"""Limit a newer GPU to the features of a V100."""

import torch

from distilspeed.trainer.engine import student
from distilspeed.trainer.models import attention

# 16 GiB without the CUDA context.
BYTES = 15 * 2**30
NO_GPU_HAS = (1000, 0)


def limit_to_v100() -> None:
    """Disable in this process what a V100 does not have.

    This is memory beyond 16 GiB, bfloat16, TF32, and all attention except SDPA's memory-efficient kernel.
    """
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, BYTES / memory))
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    attention.OLDEST_FLEX_CAPABILITY = student.OLDEST_BF16_CAPABILITY = NO_GPU_HAS


def is_limited_to_v100() -> bool:
    return attention.OLDEST_FLEX_CAPABILITY == NO_GPU_HAS
