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
    if implementation == FLEX:
        return _block_mask(document_ids, _sees(document_ids, window))
    mask = document_ids[:, :, None] == document_ids[:, None, :]
    if window is not None:
        # A matrix of distances would take eight bytes per pair of tokens.
        mask &= torch.ones_like(mask[0]).tril_(window).triu_(-window)
    return mask[:, None]


def causal_document_mask(document_ids: torch.Tensor, implementation: str | None) -> torch.Tensor | BlockMask:
    """Return the mask by which tokens see only themselves and earlier tokens of the same document.

    Arguments and result are those of :func:`document_mask`. transformers takes this mask for the whole mask of a
    decoder and adds nothing to it.
    """
    if implementation == FLEX:
        return _block_mask(document_ids, and_masks(_sees(document_ids, None), _is_earlier))
    same_document = document_mask(document_ids, implementation)
    assert isinstance(same_document, torch.Tensor)
    return same_document.tril()


def _block_mask(document_ids: torch.Tensor, sees: Callable[..., torch.Tensor]) -> BlockMask:
    rows, length = document_ids.shape
    return create_block_mask(sees, rows, None, length, length, device=document_ids.device)


def _sees(document_ids: torch.Tensor, window: int | None) -> Callable[..., torch.Tensor]:
    def same_document(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return document_ids[row, query] == document_ids[row, key]

    def near(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return (query - key).abs() <= window

    return same_document if window is None else and_masks(same_document, near)


def _is_earlier(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
    return query >= key
