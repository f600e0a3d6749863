"""Attention within documents by cumulative lengths: flash attention's varlen form, as a transformers attention.

A kernel that gets the documents' starts reads no mask and computes nothing between documents. PyTorch's public
``varlen_attn`` has no dropout, so this calls the operator below it.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from distilspeed.trainer.families.masks import VARLEN

# The kernels of flash attention need this compute capability and one of these dtypes.
OLDEST_VARLEN_CAPABILITY = (8, 0)
VARLEN_DTYPES = (torch.float16, torch.bfloat16)
UNLIMITED = -1


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' attention functions return: [rows, length, heads, head size], and no probabilities.

    Args:
        module: the attention layer; its ``is_causal`` says whether tokens see only earlier ones.
        query: fp16 or bf16 [rows, heads, length, head size], like ``key`` and ``value``.
        attention_mask: int32 [1, 1, 1, starts], the starts of :class:`Documents`.
        dropout: probability of dropping a token's attention to another.
        scaling: factor of the scores; None for head size ** -0.5.
        sliding_window: 1 more than the largest distance to a token that is seen, as transformers counts.
    """
    rows, length = query.shape[0], query.shape[2]
    starts = attention_mask.flatten()
    window = UNLIMITED if sliding_window is None else sliding_window - 1
    is_causal = bool(module.is_causal)
    packed = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = torch.ops.aten._flash_attention_forward(
        *packed,
        starts,
        starts,
        length,
        length,
        dropout,
        is_causal,
        return_debug_mask=False,
        scale=scaling,
        window_size_left=window,
        window_size_right=0 if is_causal else window,
    )[0]
    return output.unflatten(0, (rows, length)), None


AttentionInterface.register(VARLEN, varlen_attention)
