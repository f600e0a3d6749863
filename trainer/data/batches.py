"""Which rows make a global batch and each rank's micro-batches, and the loader that reads ahead.

The rows of all epochs form one endless sequence: epoch e is a permutation of the training rows keyed
by (seed, e). Global batch s is rows [s B, (s + 1) B) of it, whatever the split, and the place to
resume from is the step number alone. A global batch may span two epochs; no row is ever dropped.
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
from distilspeed.trainer.data.masking import MaskingRule, masked_token_count, masking_rule, philox
from distilspeed.trainer.data.micro_batch import MicroBatch, masked_micro_batch
from distilspeed.trainer.job.processes import STOP_SIGNALS, children_deaf_to

# Random streams beside masking's, which is 0.
ROW_ORDER_STREAM, DROPOUT_STREAM = 1, 2
# Micro-batches that each worker process has ready: a step of the original's recipe is tens of them long.
PREFETCH_FACTOR = 4
# While a rank masks its own micro-batches it launches nothing on its GPU.
WORKERS_PER_GPU = 2


def total_steps(num_rows: int, train_batch_size: int, max_steps: int | None, num_train_epochs: float) -> int:
    """Optimiser steps of a run: ``max_steps``, or as many as see every row ``num_train_epochs`` times."""
    return max_steps or math.ceil(num_rows * num_train_epochs / train_batch_size)


def corpus_masking_rule(corpus: Corpus) -> MaskingRule:
    """The masking rule of a corpus: its training rows' token counts, its tokenizer's special tokens."""
    return masking_rule(corpus.token_counts, list(corpus.manifest.special_ids), corpus.manifest.mask_id)


# Caches of functions, not of methods: a worker that is spawned gets a copy of the object, and a cache has none.
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

    def __len__(self) -> int:
        raise TypeError("the sequence of micro-batches has no end; a sampler says which to take")

    def global_batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and row numbers of a global batch, int64 [train_batch_size] each."""
        return _choose_rows(len(self.rows), self.seed, self.batch.train_batch_size, step)

    def count_tokens(self, step: int) -> int:
        """Real tokens of global batch ``step``."""
        _, rows = self.global_batch(step)
        return int(self.real_tokens[rows].sum())

    def _places(self, accumulation_step: int) -> slice:
        """Where this rank's micro-batch of an accumulation step stands in the global batch."""
        size = self.batch.micro_batch_size
        first = self.batch.micro_batch_number(accumulation_step, self.rank) * size
        return slice(first, first + size)

    def rows_of(self, step: int, accumulation_step: int) -> list[int]:
        """Row numbers of this rank's micro-batch."""
        _, rows = self.global_batch(step)
        return rows[self._places(accumulation_step)].tolist()

    def __getitem__(self, index: int) -> MicroBatch:
        step, accumulation_step = divmod(index, self.batch.gradient_accumulation_steps)
        epochs, rows = self.global_batch(step)
        mine = self._places(accumulation_step)

        return masked_micro_batch(
            read_rows(self.rows, rows[mine]),
            rows[mine],
            epochs[mine],
            self.rule,
            self.seed,
            real_tokens=int(self.real_tokens[rows].sum()),
            masked_tokens=int(self.masked_tokens[rows].sum()),
        )

    def loader(self, first_batch: int, last_batch: int | None, num_workers: int) -> DataLoader[MicroBatch]:
        """Micro-batches of the global batches [first_batch, last_batch), in order; None: without end."""
        accumulation_steps = self.batch.gradient_accumulation_steps
        end = sys.maxsize if last_batch is None else last_batch * accumulation_steps
        return _Loader(
            self,
            batch_size=None,
            sampler=range(first_batch * accumulation_steps, end),
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # it draws a seed for its workers, which must not come out of dropout's
            prefetch_factor=PREFETCH_FACTOR if num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )


def resolve_num_workers(asked: int | None, device: torch.device) -> int:
    """Worker processes of a rank's loader: as many as asked for, or two on a GPU and none on a CPU."""
    return (WORKERS_PER_GPU if device.type == "cuda" else 0) if asked is None else asked


class _Loader(DataLoader[MicroBatch]):
    """Its workers leave signals to the trainer: the last step before a checkpoint still needs its data."""

    def __iter__(self) -> Any:
        with children_deaf_to(STOP_SIGNALS):
            return super().__iter__()


def _start_worker(worker: int) -> None:
    """Say nothing where the trainer has gone: which has been said, and the worker ends with it.

    A thread of multiprocessing hands the tensors over and shows an error as an uncaught exception.
    """
    show = sys.excepthook

    def show_unless_trainer_is_gone(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        # One without a number is multiprocessing's, of a message that was cut off.
        cut_off = isinstance(error, OSError) and error.errno is None
        if not (cut_off or isinstance(error, ConnectionError | EOFError)):
            show(kind, error, traceback)

    sys.excepthook = show_unless_trainer_is_gone


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Generator[MicroBatch, None, None]:
    """The micro-batches on the device; to a GPU each is copied on a stream of its own, while the one before is used."""
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
        # What is computed next waits for the copy, and the memory is not given to others before it is done with it.
        torch.cuda.current_stream(device).wait_stream(copies)
        for tensor in copied:
            tensor.record_stream(torch.cuda.current_stream(device))
        ahead = copied
    if ahead is not None:
        yield ahead
