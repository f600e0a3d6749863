"""The tensors of a micro-batch of packed rows, masked or with the next tokens as labels."""

import math
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from distilspeed.trainer.corpus.format import RowBatch
from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.data.masking import (
    IGNORE_INDEX,
    MASKED_FRACTION,
    MaskingRule,
    mask_rows,
    masked_token_count,
)

PADDING_DOCUMENT = -1


class MicroBatch(NamedTuple):
    """One rank's rows for one accumulation step, packed and labelled.

    ``real_tokens`` and ``labelled_tokens`` count the global batch (all ranks and accumulation steps). They are the
    denominators of the losses.
    """

    input_ids: torch.Tensor  # int64 [rows, length], masked in a masked corpus
    labels: torch.Tensor  # int64 [rows, length], the masked or the next tokens; -100 for none
    document_ids: torch.Tensor  # int64 [rows, length], numbered within the row, -1 on padding
    position_ids: torch.Tensor  # int64 [rows, length], from 0 in each document
    row_ids: torch.Tensor  # int64 [rows], row numbers in the split of the corpus
    real_tokens: torch.Tensor  # float32 []
    labelled_tokens: torch.Tensor  # float32 []
    labelled_places: torch.Tensor  # int64, see labelled_places()
    document_starts: torch.Tensor  # int32, see document_starts()

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def document_layout(
    document_lengths: list[NDArray[np.integer]], row_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the document number and position of every token of packed rows.

    Args:
        document_lengths: for each row, the lengths of its one or more documents in order; the rest of the row is
            padding.

    Returns:
        document_ids (-1 on padding) and position_ids (0 on padding), int64 [rows, row_length].
    """
    documents = np.array([len(of_row) for of_row in document_lengths])
    lengths = np.concatenate(document_lengths)
    real_tokens = np.add.reduceat(lengths, documents.cumsum() - documents)

    is_real = np.arange(row_length) < real_tokens[:, None]
    document_ids = np.full(is_real.shape, PADDING_DOCUMENT, dtype=np.int64)
    position_ids = np.zeros_like(document_ids)
    document_ids[is_real] = np.repeat(_counted_up(documents), lengths)
    position_ids[is_real] = _counted_up(lengths)
    return document_ids, position_ids


def _counted_up(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return 0 to length - 1 for each length, joined: 0 1 0 1 2 for [2, 3]."""
    return np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)


def document_starts(document_ids: NDArray[np.int64], most_documents: int) -> NDArray[np.int32]:
    """Return the first token of each document in the flattened rows, then the number of tokens, up to a fixed length.

    These are the cumulative lengths that flash attention takes; the repeated end stands for empty documents. A row's
    padding counts as a document.

    Args:
        document_ids: int64 [rows, length], -1 on padding.
        most_documents: at least the number of documents of every row.

    Returns:
        int32 [rows x (most_documents + 1) + 1].
    """
    is_start = np.ones(document_ids.shape, dtype=bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    found = np.flatnonzero(is_start)
    starts = np.full(len(document_ids) * (most_documents + 1) + 1, document_ids.size, dtype=np.int32)
    starts[: len(found)] = found
    return starts


def next_tokens(input_ids: NDArray[np.int64], document_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each token's next token of the same document; -100 at a document's last token and on padding.

    All arrays are int64 [rows, length].
    """
    labels = np.full_like(input_ids, IGNORE_INDEX)
    has_next = (document_ids[:, :-1] == document_ids[:, 1:]) & (document_ids[:, :-1] != PADDING_DOCUMENT)
    labels[:, :-1][has_next] = input_ids[:, 1:][has_next]
    return labels


def labelled_places(labels: NDArray[np.int64], share: float = MASKED_FRACTION) -> NDArray[np.int64]:
    """Return the indices of the labelled tokens, padded with unlabelled tokens to a fixed length.

    The length depends only on the shape of ``labels``. So nothing waits for a device to count, and no kernel is
    selected or compiled again.

    Args:
        labels: int64 [rows, length].
        share: the share of a row that may have labels: 15 % in a masked corpus.

    Returns:
        indices into the flattened rows, int64 [rows x share of the length, rounded up].
    """
    rows, length = labels.shape
    most = rows * math.ceil(share * length)
    is_labelled = labels.ravel() != IGNORE_INDEX
    labelled = np.flatnonzero(is_labelled)
    return np.concatenate([labelled, np.flatnonzero(~is_labelled)[: most - len(labelled)]])


def row_token_counts(
    rows: datasets.Dataset, objective: TrainingObjective
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Return the real tokens of each row, and how many of them have labels.

    The counts depend on the rows alone, so every rank knows those of the global batch without communication.
    """
    columns = rows.data
    real_tokens = columns.column("real_tokens").to_numpy()
    if objective == "causal":  # every token but the last of each document
        return real_tokens, real_tokens - pc.list_value_length(columns.column("document_lengths")).to_numpy()
    return real_tokens, masked_token_count(real_tokens, columns.column("maskable_tokens").to_numpy())


def most_documents(rows: datasets.Dataset) -> int:
    """Return the number of documents of the row that has the most."""
    return int(pc.max(pc.list_value_length(rows.data.column("document_lengths"))).as_py())


def labelled_micro_batch(
    stored: RowBatch,
    row_ids: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rule: MaskingRule | None,
    seed: int,
    real_tokens: int,
    labelled_tokens: int,
    most_documents: int,
) -> MicroBatch:
    """Lay out the documents of rows, and mask the rows or label each token with the next.

    Args:
        stored: the rows.
        row_ids: row numbers, int64 [rows]; with ``epochs`` (int64 [rows]) and ``seed`` they determine the masks.
        rule: how to mask; None for rows of a causal corpus.
        real_tokens: count in the global batch.
        labelled_tokens: count in the global batch.
        most_documents: of any row of the split.
    """
    document_ids, position_ids = document_layout(stored.document_lengths, stored.input_ids.shape[1])
    if rule is None:
        input_ids, labels = stored.input_ids, next_tokens(stored.input_ids, document_ids)
    else:
        in_each_row = (document_ids != PADDING_DOCUMENT).sum(axis=1)
        input_ids, labels = mask_rows(stored.input_ids, in_each_row, rule, seed, epochs, row_ids)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(document_ids),
        position_ids=torch.from_numpy(position_ids),
        row_ids=torch.from_numpy(row_ids),
        real_tokens=torch.tensor(real_tokens, dtype=torch.float32),
        # At least 1: rows with only special tokens have no masked tokens, and their loss must be 0, not 0 / 0.
        labelled_tokens=torch.tensor(max(1, labelled_tokens), dtype=torch.float32),
        labelled_places=torch.from_numpy(labelled_places(labels, MASKED_FRACTION if rule else 1.0)),
        document_starts=torch.from_numpy(document_starts(document_ids, most_documents)),
    )
