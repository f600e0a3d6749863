"""Attention masks of packed rows, in the form of each attention implementation."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

# transformers' name of the attention implementation that takes a BlockMask.
FLEX = "flex_attention"


def document_mask(
    document_ids: torch.Tensor, implementation: str | None, window: int | None = None
) -> torch.Tensor | BlockMask:
    """Return the mask by which tokens of packed rows see only tokens of the same document.

    Padding sees padding: an empty row of the mask would give NaN.

    Args:
        document_ids: int64 [rows, length], -1 on padding.
        implementation: transformers' name of the attention implementation.
        window: the largest distance to a token that is seen, in tokens; None for the whole document.

    Returns:
        bool [rows, 1, length, length], or a BlockMask for "flex_attention".
    """
    rows, length = document_ids.shape
    if implementation == FLEX:
        return create_block_mask(
            _sees(document_ids, window), rows, None, length, length, device=document_ids.device
        )
    mask = document_ids[:, :, None] == document_ids[:, None, :]
    if window is not None:
        # A matrix of distances would take eight bytes per pair of tokens.
        mask &= torch.ones_like(mask[0]).tril_(window).triu_(-window)
    return mask[:, None]


def _sees(document_ids: torch.Tensor, window: int | None) -> Callable[..., torch.Tensor]:
    def same_document(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return document_ids[row, query] == document_ids[row, key]

    def near(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return (query - key).abs() <= window

    return same_document if window is None else and_masks(same_document, near)
