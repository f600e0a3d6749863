"""The rows of each global batch and each rank's micro-batches, and the loader that prefetches them.

The rows of all epochs form one endless sequence: epoch e is a permutation of the training rows, keyed by (seed, e).
Global batch s of size B is rows [s B, (s + 1) B) of this sequence, for any split over ranks and accumulation steps. The
step number alone is enough to resume. A global batch may span two epochs; no row is dropped.
"""

import math
import sys
from collections.abc import Generator, Iterable
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from distilspeed.trainer.corpus.format import Corpus, read_rows
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.masking import SMOOTHING, MaskingRule, masking_rule, philox
from distilspeed.trainer.data.micro_batch import (
    MicroBatch,
    labelled_micro_batch,
    most_documents,
    row_token_counts,
)
from distilspeed.trainer.job.processes import STOP_SIGNALS, children_deaf_to

# Random streams besides the masking stream, 0.
ROW_ORDER_STREAM, DROPOUT_STREAM = 1, 2
# Micro-batches that each worker prefetches. A step of DistilBERT's recipe has tens of micro-batches.
PREFETCH_FACTOR = 4
# Without workers, the GPU would idle while its rank masks micro-batches.
WORKERS_PER_GPU = 2


def total_steps(num_rows: int, train_batch_size: int, max_steps: int | None, num_train_epochs: float) -> int:
    """Return the number of optimiser steps: ``max_steps``, or enough steps for ``num_train_epochs`` epochs."""
    return max_steps or math.ceil(num_rows * num_train_epochs / train_batch_size)


def corpus_masking_rule(corpus: Corpus, smoothing: float = SMOOTHING) -> MaskingRule | None:
    """Return the masking rule for the token counts and special tokens of a corpus; None for a causal corpus."""
    manifest = corpus.manifest
    if manifest.mask_id is None:
        return None
    return masking_rule(corpus.token_counts, list(manifest.special_ids), manifest.mask_id, smoothing)


# Cached functions, not cached methods: spawned workers pickle the object, and a cache cannot be pickled.
@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = np.random.Generator(philox(seed, epoch, stream=(ROW_ORDER_STREAM, 0)))
    return generator.permutation(num_rows)


@lru_cache(maxsize=2)
def _choose_rows(
    num_rows: int, seed: int, train_batch_size: int, step: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first = step * train_batch_size
    epochs, places = np.divmod(np.arange(first, first + train_batch_size), num_rows)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        of_epoch = epochs == epoch
        rows[of_epoch] = _epoch_order(num_rows, seed, int(epoch))[places[of_epoch]]
    return epochs, rows


class MicroBatches(Dataset[MicroBatch]):
    """The micro-batches of one rank: item i is accumulation step i % G of global batch i // G.

    G is the number of gradient accumulation steps.
    """

    def __init__(
        self, corpus: Corpus, batch: BatchEquation, rank: int, seed: int, mlm_smoothing: float = SMOOTHING
    ) -> None:
        self.rows = corpus.train
        self.row_length = corpus.manifest.seq_length
        self.rule = corpus_masking_rule(corpus, mlm_smoothing)
        self.real_tokens, self.labelled_tokens = row_token_counts(self.rows, corpus.manifest.objective)
        self.most_documents = most_documents(self.rows)
        self.batch = batch
        self.rank = rank
        self.seed = seed

    def __len__(self) -> int:
        raise TypeError("the sequence of micro-batches is endless; select items with a sampler")

    def global_batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epochs and row numbers of a global batch, int64 [train_batch_size] each."""
        return _choose_rows(len(self.rows), self.seed, self.batch.train_batch_size, step)

    def count_tokens(self, step: int) -> int:
        """Return the number of real tokens in global batch ``step``."""
        _, rows = self.global_batch(step)
        return int(self.real_tokens[rows].sum())

    def _places(self, accumulation_step: int) -> slice:
        """Return the slice of the global batch that is this rank's micro-batch in an accumulation step."""
        size = self.batch.micro_batch_size
        first = self.batch.micro_batch_number(accumulation_step, self.rank) * size
        return slice(first, first + size)

    def rows_of(self, step: int, accumulation_step: int) -> list[int]:
        """Return the row numbers of this rank's micro-batch."""
        _, rows = self.global_batch(step)
        return rows[self._places(accumulation_step)].tolist()

    def __getitem__(self, index: int) -> MicroBatch:
        step, accumulation_step = divmod(index, self.batch.gradient_accumulation_steps)
        epochs, rows = self.global_batch(step)
        mine = self._places(accumulation_step)

        return labelled_micro_batch(
            read_rows(self.rows, rows[mine]),
            rows[mine],
            epochs[mine],
            self.rule,
            self.seed,
            real_tokens=int(self.real_tokens[rows].sum()),
            labelled_tokens=int(self.labelled_tokens[rows].sum()),
            most_documents=self.most_documents,
        )

    def loader(self, first_batch: int, last_batch: int | None, num_workers: int) -> DataLoader[MicroBatch]:
        """Return a loader of the global batches [first_batch, last_batch), in order; None means no end."""
        accumulation_steps = self.batch.gradient_accumulation_steps
        end = sys.maxsize if last_batch is None else last_batch * accumulation_steps
        return _Loader(
            self,
            batch_size=None,
            sampler=range(first_batch * accumulation_steps, end),
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the loader draws a seed, which must not advance dropout's generator
            prefetch_factor=PREFETCH_FACTOR if num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )


def resolve_num_workers(asked: int | None, device: torch.device) -> int:
    """Return the number of loader workers per rank: ``asked`` if given, else two on a GPU and none on a CPU."""
    return (WORKERS_PER_GPU if device.type == "cuda" else 0) if asked is None else asked


class _Loader(DataLoader[MicroBatch]):
    """A DataLoader whose workers ignore stop signals: the last step before a checkpoint still needs its data."""

    def __iter__(self) -> Any:
        with children_deaf_to(STOP_SIGNALS):
            return super().__iter__()


def _start_worker(worker: int) -> None:
    """Hide the errors that a worker gets when the trainer dies: the end of the trainer is reported elsewhere.

    A thread of multiprocessing hands over the tensors, and its errors reach ``sys.excepthook``.
    """
    show = sys.excepthook

    def show_unless_trainer_died(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        # multiprocessing raises an OSError without errno for a truncated message.
        truncated = isinstance(error, OSError) and error.errno is None
        if not (truncated or isinstance(error, ConnectionError | EOFError)):
            show(kind, error, traceback)

    sys.excepthook = show_unless_trainer_died


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Generator[MicroBatch, None, None]:
    """Yield the micro-batches on the device; a side stream copies each to a GPU while the one before is in use."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    ahead: MicroBatch | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            copied = batch.to(device)
        if ahead is not None:
            yield ahead
        # Later kernels wait for the copy, and the allocator does not reuse the memory before they have finished.
        torch.cuda.current_stream(device).wait_stream(copies)
        for tensor in copied:
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead
