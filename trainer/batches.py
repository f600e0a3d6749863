"""Which rows make a global batch, and the tensors of each rank's micro-batches.

The rows of all epochs form one endless sequence: epoch e is a permutation of the training rows keyed
by (seed, e). Global batch s is rows [s B, (s + 1) B) of it, whatever the split, and the place to
resume from is the step number alone. A global batch may span two epochs; no row is ever dropped.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from distilspeed.trainer.config import BatchEquation
from distilspeed.trainer.corpus import Corpus, read_rows
from distilspeed.trainer.masking import MaskingRule, mask_row, masked_token_count, masking_rule, philox

# Random streams beside masking's, which is 0.
ROW_ORDER_STREAM, DROPOUT_STREAM = 1, 2
PADDING_DOCUMENT = -1


class MicroBatch(NamedTuple):
    """One rank's rows of one accumulation step, packed and masked.

    ``real_tokens`` and ``masked_tokens`` count the whole global batch (all ranks, all accumulation
    steps): the denominators of the losses.
    """

    input_ids: torch.Tensor  # int64 [rows, length], masked
    labels: torch.Tensor  # int64 [rows, length], -100 where not masked
    document_ids: torch.Tensor  # int64 [rows, length], numbered within the row, -1 on padding
    position_ids: torch.Tensor  # int64 [rows, length], from 0 in each document
    row_ids: torch.Tensor  # int64 [rows], numbers of the corpus's training rows
    real_tokens: torch.Tensor  # float32 []
    masked_tokens: torch.Tensor  # float32 []

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


def document_layout(
    document_lengths: list[NDArray[np.integer]], row_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Document number and position of every token of packed rows.

    Args:
        document_lengths: per row the lengths of its documents, in order; what they leave is padding.

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


def total_steps(num_rows: int, train_batch_size: int, max_steps: int | None, num_train_epochs: float) -> int:
    """Optimiser steps of a run: ``max_steps``, or as many as see every row ``num_train_epochs`` times."""
    return max_steps or math.ceil(num_rows * num_train_epochs / train_batch_size)


def corpus_masking_rule(corpus: Corpus) -> MaskingRule:
    """The masking rule of a corpus: its training rows' token counts, its tokenizer's special tokens."""
    return masking_rule(corpus.token_counts, list(corpus.manifest.special_ids), corpus.manifest.mask_id)


class MicroBatches(Dataset[MicroBatch]):
    """Micro-batches of one rank; item i is accumulation step i % G of global batch i // G."""

    def __init__(self, corpus: Corpus, batch: BatchEquation, rank: int, seed: int) -> None:
        self.rows = corpus.train
        self.row_length = corpus.manifest.seq_length
        self.rule = corpus_masking_rule(corpus)
        self.real_tokens = self.rows.data.column("real_tokens").to_numpy()
        maskable_tokens = self.rows.data.column("maskable_tokens").to_numpy()
        self.masked_tokens = masked_token_count(self.real_tokens, maskable_tokens)
        self.batch = batch
        self.rank = rank
        self.seed = seed
        self._epoch_order = functools.lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        raise TypeError("the sequence of micro-batches has no end; a sampler says which to take")

    def global_batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and row numbers of global batch ``step``, int64 [train_batch_size] each."""
        first = step * self.batch.train_batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch.train_batch_size), len(self.rows))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            rows[of_epoch] = self._epoch_order(int(epoch))[places[of_epoch]]
        return epochs, rows

    def count_tokens(self, step: int) -> int:
        """Real tokens of global batch ``step``."""
        _, rows = self.global_batch(step)
        return int(self.real_tokens[rows].sum())

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        generator = np.random.Generator(philox(self.seed, epoch, stream=(ROW_ORDER_STREAM, 0)))
        return generator.permutation(len(self.rows))

    def __getitem__(self, index: int) -> MicroBatch:
        step, accumulation_step = divmod(index, self.batch.gradient_accumulation_steps)
        epochs, rows = self.global_batch(step)
        size = self.batch.micro_batch_size
        first = (accumulation_step * self.batch.world_size + self.rank) * size
        mine = slice(first, first + size)

        stored = read_rows(self.rows, rows[mine])
        document_ids, position_ids = document_layout(stored.document_lengths, self.row_length)
        masked = [
            mask_row(ids, int(self.real_tokens[row]), self.rule, self.seed, int(epoch), int(row))
            for ids, epoch, row in zip(stored.input_ids, epochs[mine], rows[mine], strict=True)
        ]
        return MicroBatch(
            input_ids=torch.from_numpy(np.stack([ids for ids, _ in masked])),
            labels=torch.from_numpy(np.stack([labels for _, labels in masked])),
            document_ids=torch.from_numpy(document_ids),
            position_ids=torch.from_numpy(position_ids),
            row_ids=torch.from_numpy(rows[mine]),
            real_tokens=torch.tensor(self.real_tokens[rows].sum(), dtype=torch.float32),
            # At least 1: rows of nothing but special tokens have no masked ones, and a loss of 0, not 0 / 0.
            masked_tokens=torch.tensor(max(1, self.masked_tokens[rows].sum()), dtype=torch.float32),
        )

    def loader(self, first_step: int, last_step: int, num_workers: int) -> DataLoader[MicroBatch]:
        """Micro-batches of the steps [first_step, last_step), in order."""
        accumulation_steps = self.batch.gradient_accumulation_steps
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(first_step * accumulation_steps, last_step * accumulation_steps),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )
