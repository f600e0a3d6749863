"""Attention masks of packed rows, in the form that each attention takes."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# transformers' name of the attention that takes a BlockMask.
FLEX = "flex_attention"


def document_mask(document_ids: torch.Tensor, implementation: str | None) -> torch.Tensor | BlockMask:
    """Which tokens of packed rows see each other: those of one document.

    Padding sees padding: a row of the mask with nothing in it would give NaN.

    Args:
        document_ids: int64 [rows, length], -1 on padding.
        implementation: transformers' name of the attention that takes the mask.

    Returns:
        bool [rows, 1, length, length], or for "flex_attention" its BlockMask.
    """
    if implementation == FLEX:
        rows, length = document_ids.shape
        return create_block_mask(
            lambda row, head, query, key: document_ids[row, query] == document_ids[row, key],
            rows,
            None,
            length,
            length,
            device=document_ids.device,
        )
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
