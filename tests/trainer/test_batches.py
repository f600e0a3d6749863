"""Which rows make a batch does not depend on how it is split, nor on where a run was resumed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distilspeed.trainer.batches import (
    MicroBatch,
    MicroBatches,
    document_layout,
    resolve_num_workers,
    total_steps,
)
from distilspeed.trainer.config import BatchEquation
from distilspeed.trainer.corpus import Corpus, open_corpus
from distilspeed.trainer.masking import IGNORE_INDEX

SPLITS = [(24, 1, 1), (12, 2, 1), (6, 2, 2), (2, 4, 3), (1, 24, 1), (8, 1, 3)]


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


OF_ROWS, COUNTS = MicroBatch._fields[:5], ("real_tokens", "masked_tokens")


def global_batch(corpus: Corpus, micro: int, accumulation: int, world: int, step: int, seed: int = 5) -> dict:
    """All rows of one global batch, in the order of their row ids."""
    equation = BatchEquation(micro * accumulation * world, micro, accumulation, world)
    parts: list[MicroBatch] = []
    for rank in range(world):
        loader = MicroBatches(corpus, equation, rank, seed).loader(step, step + 1, num_workers=0)
        parts += list(loader)
    rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in OF_ROWS}
    order = rows["row_ids"].argsort(stable=True)
    counts = {name: {float(getattr(part, name)) for part in parts} for name in COUNTS}
    return {name: rows[name][order] for name in rows} | counts


@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_global_batch_is_the_same_however_it_is_split(corpus: Corpus, split: tuple[int, int, int]) -> None:
    for step in (0, 3):
        whole, divided = global_batch(corpus, *SPLITS[0], step=step), global_batch(corpus, *split, step=step)
        for name in OF_ROWS:
            assert torch.equal(whole[name], divided[name]), name
        for name in COUNTS:
            assert whole[name] == divided[name], name


def test_the_counts_are_those_of_the_whole_global_batch(corpus: Corpus) -> None:
    batch = global_batch(corpus, 6, 2, 2, step=1)
    assert batch["real_tokens"] == {float((batch["document_ids"] >= 0).sum())}
    assert batch["masked_tokens"] == {float((batch["labels"] != IGNORE_INDEX).sum())}


def test_every_epoch_holds_every_row_once_and_in_another_order(corpus: Corpus) -> None:
    rows = len(corpus.train)
    batches = MicroBatches(corpus, BatchEquation(1, 1, 1, 1), rank=0, seed=0)
    order = [int(batches.global_batch(step)[1][0]) for step in range(2 * rows)]
    assert sorted(order[:rows]) == sorted(order[rows:]) == list(range(rows))
    assert order[:rows] != order[rows:]


def test_a_global_batch_may_span_two_epochs_and_masks_each_row_by_its_own(corpus: Corpus) -> None:
    rows = len(corpus.train)
    size = rows - 5
    batches = MicroBatches(corpus, BatchEquation(size, size, 1, 1), rank=0, seed=0)
    epochs, _ = batches.global_batch(1)
    assert epochs.tolist() == [0] * 5 + [1] * (size - 5)


def test_resuming_at_a_step_gives_the_batches_that_come_there(corpus: Corpus) -> None:
    equation = BatchEquation(8, 2, 2, 2)
    batches = MicroBatches(corpus, equation, rank=1, seed=3)
    straight = list(batches.loader(0, 6, num_workers=0))
    resumed = list(MicroBatches(corpus, equation, rank=1, seed=3).loader(4, 6, num_workers=2))
    for expected, found in zip(straight[8:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("asked", "device", "num_workers"),
    [(None, "cpu", 0), (None, "cuda", 2), (0, "cuda", 0), (3, "cpu", 3)],
)
def test_a_gpu_has_two_workers_unless_told_otherwise(
    asked: int | None, device: str, num_workers: int
) -> None:
    assert resolve_num_workers(asked, torch.device(device)) == num_workers


def test_the_masked_places_are_every_masked_token_and_constant_in_number(corpus: Corpus) -> None:
    equation = BatchEquation(6, 6, 1, 1)
    for batch in MicroBatches(corpus, equation, rank=0, seed=0).loader(0, 4, num_workers=0):
        rows, length = batch.labels.shape
        assert batch.masked_places.shape == (rows * math.ceil(0.15 * length),)
        assert len(set(batch.masked_places.tolist())) == len(batch.masked_places)
        found = batch.labels.flatten()[batch.masked_places]
        assert (found != IGNORE_INDEX).sum() == (batch.labels != IGNORE_INDEX).sum()


def test_documents_are_numbered_and_positions_restart_in_each() -> None:
    document_ids, position_ids = document_layout([np.array([3, 2]), np.array([6])], row_length=6)
    assert document_ids.tolist() == [[0, 0, 0, 1, 1, -1], [0] * 6]
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_total_steps() -> None:
    assert total_steps(1000, 64, None, 3.0) == 47
    assert total_steps(1000, 64, 12, 3.0) == 12
    assert total_steps(10, 64, None, 0.5) == 1
