"""The tensors of a micro-batch of packed and masked rows."""

import math
from typing import NamedTuple

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from distilspeed.trainer.corpus.format import RowBatch
from distilspeed.trainer.data.masking import (
    IGNORE_INDEX,
    MASKED_FRACTION,
    MaskingRule,
    mask_row,
    masked_token_count,
)

PADDING_DOCUMENT = -1


class MicroBatch(NamedTuple):
    """One rank's rows for one accumulation step, packed and masked.

    ``real_tokens`` and ``labelled_tokens`` count the global batch (all ranks and accumulation steps). They are the
    denominators of the losses.
    """

    input_ids: torch.Tensor  # int64 [rows, length], masked
    labels: torch.Tensor  # int64 [rows, length], -100 where not masked
    document_ids: torch.Tensor  # int64 [rows, length], numbered within the row, -1 on padding
    position_ids: torch.Tensor  # int64 [rows, length], from 0 in each document
    row_ids: torch.Tensor  # int64 [rows], row numbers in the split of the corpus
    real_tokens: torch.Tensor  # float32 []
    labelled_tokens: torch.Tensor  # float32 []
    labelled_places: torch.Tensor  # int64 [rows x 15 % of the length, rounded up], see labelled_places()

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def document_layout(
    document_lengths: list[NDArray[np.integer]], row_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the document number and position of every token of packed rows.

    Args:
        document_lengths: for each row, the lengths of its documents in order; the rest of the row is padding.

    Returns:
        document_ids (-1 on padding) and position_ids (0 on padding), int64 [rows, row_length].
    """
    document_ids = np.full((len(document_lengths), row_length), PADDING_DOCUMENT, dtype=np.int64)
    position_ids = np.zeros_like(document_ids)
    for row, lengths in enumerate(document_lengths):
        real = int(np.sum(lengths))
        starts = np.cumsum(lengths) - lengths
        document_ids[row, :real] = np.repeat(np.arange(len(lengths)), lengths)
        position_ids[row, :real] = np.arange(real) - np.repeat(starts, lengths)
    return document_ids, position_ids


def labelled_places(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of the labelled tokens, padded with unlabelled tokens to a fixed length.

    The length depends only on the shape of ``labels``. So nothing waits for a device to count, and no kernel is
    selected or compiled again.

    Args:
        labels: int64 [rows, length]; at most 15 % of a row, rounded up, have a label.

    Returns:
        indices into the flattened rows, int64 [rows x 15 % of the length, rounded up].
    """
    rows, length = labels.shape
    most = rows * math.ceil(MASKED_FRACTION * length)
    is_labelled = labels.ravel() != IGNORE_INDEX
    labelled = np.flatnonzero(is_labelled)
    return np.concatenate([labelled, np.flatnonzero(~is_labelled)[: most - len(labelled)]])


def row_token_counts(rows: datasets.Dataset) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Return the real tokens of each row, and how many of them are masked."""
    real_tokens, maskable_tokens = (
        rows.data.column(name).to_numpy() for name in ("real_tokens", "maskable_tokens")
    )
    return real_tokens, masked_token_count(real_tokens, maskable_tokens)


def masked_micro_batch(
    stored: RowBatch,
    row_ids: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rule: MaskingRule,
    seed: int,
    real_tokens: int,
    labelled_tokens: int,
) -> MicroBatch:
    """Mask rows and lay out their documents.

    Args:
        stored: the rows.
        row_ids: row numbers, int64 [rows]; with ``epochs`` (int64 [rows]) and ``seed`` they determine the masks.
        real_tokens: count in the global batch.
        labelled_tokens: count in the global batch.
    """
    document_ids, position_ids = document_layout(stored.document_lengths, stored.input_ids.shape[1])
    masked = [
        mask_row(ids, int(lengths.sum()), rule, seed, int(epoch), int(row))
        for ids, lengths, epoch, row in zip(
            stored.input_ids, stored.document_lengths, epochs, row_ids, strict=True
        )
    ]
    labels = np.stack([labels for _, labels in masked])
    return MicroBatch(
        input_ids=torch.from_numpy(np.stack([ids for ids, _ in masked])),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(document_ids),
        position_ids=torch.from_numpy(position_ids),
        row_ids=torch.from_numpy(row_ids),
        real_tokens=torch.tensor(real_tokens, dtype=torch.float32),
        # At least 1: rows with only special tokens have no masked tokens, and their loss must be 0, not 0 / 0.
        labelled_tokens=torch.tensor(max(1, labelled_tokens), dtype=torch.float32),
        labelled_places=torch.from_numpy(labelled_places(labels)),
    )
