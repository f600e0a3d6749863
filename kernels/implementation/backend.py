"""Which implementation of a loss runs where.

=====================================================  ==================================================
logits                                                 implementation
=====================================================  ==================================================
fp16, bf16 or fp32 on a CUDA device                    Triton
the same on the CPU, while TRITON_INTERPRET=1          Triton's interpreter (NumPy; only for tests)
everything else: CPU, float64, no Triton installed     PyTorch, chunk by chunk over rows
=====================================================  ==================================================
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Read once: Triton decides between compiler and interpreter when it is imported, and cannot be changed later.
INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels take ``tensor``; otherwise the chunked PyTorch implementation does."""
    return TRITON_INSTALLED and tensor.dtype in TRITON_DTYPES and (tensor.is_cuda or INTERPRETED)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype losses and statistics are computed in: float64 for float64 input, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def in_accumulation_dtype(values: Tensor, buffer: Tensor) -> Tensor:
    """``values`` in the dtype of ``buffer``, which holds them where they had another."""
    return values if values.dtype == buffer.dtype else buffer.copy_(values)


def launch_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one: Triton launches there, not where its arguments live."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
