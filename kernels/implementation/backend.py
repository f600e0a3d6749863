"""Choose the implementation of a loss by dtype and device.

=====================================================  ==================================================
logits                                                 implementation
=====================================================  ==================================================
fp16, bf16 or fp32 on a CUDA device                    Triton
the same on the CPU, with TRITON_INTERPRET=1           Triton's interpreter (NumPy; only for tests)
the same on the CPU, where a C++ compiler is found     C++, compiled at first use
everything else: float64, no compiler, no Triton       PyTorch, chunk by chunk over rows
=====================================================  ==================================================
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Read once: Triton chooses between compiler and interpreter when it is imported.
INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Return True if the Triton kernels run on ``tensor``."""
    return TRITON_INSTALLED and tensor.dtype in TRITON_DTYPES and (tensor.is_cuda or INTERPRETED)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of losses and statistics: float64 for float64 input, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def in_accumulation_dtype(values: Tensor, buffer: Tensor) -> Tensor:
    """Return ``values`` in the dtype of ``buffer``: themselves, or converted into ``buffer``."""
    return values if values.dtype == buffer.dtype else buffer.copy_(values)


def launch_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current GPU, not on that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
