"""Attention masks of packed rows, in the form of each attention implementation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

# transformers' names of attention implementations: FLEX takes a BlockMask, EAGER takes numbers that are added to the
# scores, every other one takes True where a token is seen.
FLEX = "flex_attention"
EAGER = "eager"
# Our own, see trainer/models/varlen_attention.py. It takes the documents' starts instead of a mask.
VARLEN = "varlen"


class Documents(NamedTuple):
    """The documents of packed rows.

    A row's padding counts as one more document.
    """

    ids: torch.Tensor  # int64 [rows, length], numbered within the row, -1 on padding
    # int32 [rows x (most documents of a row + 1) + 1], the first token of each document in the flattened rows; then
    # the number of tokens, repeated. So the shape is the same for all micro-batches of a corpus.
    starts: torch.Tensor


def document_mask(
    documents: Documents, implementation: str | None, window: int | None = None
) -> torch.Tensor | BlockMask:
    """Return the mask by which tokens of packed rows see only tokens of the same document.

    Padding sees padding: an empty row of the mask would give NaN.

    Args:
        implementation: transformers' name of the attention implementation.
        window: the largest distance to a token that is seen, in tokens; None for the whole document.

    Returns:
        bool [rows, 1, length, length]; for "eager" bfloat16, 0 or -inf; for "flex_attention" a BlockMask; for "varlen"
        the documents' starts, int32 [1, 1, 1, starts], and the layer knows its window.
    """
    if implementation == VARLEN:
        return _starts(documents)
    if implementation == FLEX:
        return _block_mask(documents.ids, _sees(documents.ids, window))
    mask = _same_document(documents.ids)
    if window is not None:
        # A matrix of distances would take eight bytes per pair of tokens.
        mask &= torch.ones_like(mask[0, 0]).tril_(window).triu_(-window)
    return _in_form_of(implementation, mask)


def causal_document_mask(documents: Documents, implementation: str | None) -> torch.Tensor | BlockMask:
    """Return the mask by which tokens see only themselves and earlier tokens of the same document.

    Arguments and result are those of :func:`document_mask`. transformers takes this mask for the whole mask of a
    decoder and adds nothing to it.
    """
    if implementation == VARLEN:
        return _starts(documents)
    if implementation == FLEX:
        return _block_mask(documents.ids, and_masks(_sees(documents.ids, None), _is_earlier))
    return _in_form_of(implementation, _same_document(documents.ids).tril())


def _starts(documents: Documents) -> torch.Tensor:
    # transformers passes a tensor of four dimensions on as it is.
    return documents.starts[None, None, None]


def _same_document(document_ids: torch.Tensor) -> torch.Tensor:
    return document_ids[:, None, :, None] == document_ids[:, None, None, :]


def _in_form_of(implementation: str | None, mask: torch.Tensor) -> torch.Tensor:
    if implementation != EAGER:
        return mask
    # bfloat16 holds both numbers, and added to scores in float32 or bfloat16 it leaves their dtype.
    return torch.zeros_like(mask, dtype=torch.bfloat16).masked_fill_(~mask, -torch.inf)


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
