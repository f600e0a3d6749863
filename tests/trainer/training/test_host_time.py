"""What the trainer adds to the host's work at each micro-step, in function calls: times differ between machines."""

import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import DROPOUT_STREAM, MicroBatches
from distilspeed.trainer.data.masking import philox
from distilspeed.trainer.training.step import seed_dropout

# About half as many were measured, with NumPy 2.4 and torch 2.13.
CALLS_PER_ROW, CALLS_PER_MICRO_BATCH, CALLS_PER_SEED = 4, 400, 30


def calls_of(function: Callable[[], object]) -> int:
    """Return the number of function calls that a second run of ``function`` makes, built-in functions included."""
    function()
    profile = cProfile.Profile()
    profile.runcall(function)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


def test_few_functions_are_called_for_each_row_of_a_micro_batch(small_corpus_dir: Path) -> None:
    corpus = open_corpus(small_corpus_dir)
    few, many = (
        calls_of(lambda rows=rows: MicroBatches(corpus, BatchEquation(rows, rows, 1, 1), 0, seed=0)[0])
        for rows in (8, 40)
    )
    # Reading a row, and drawing its words.
    assert (many - few) / 32 < CALLS_PER_ROW
    assert few < CALLS_PER_MICRO_BATCH


def test_seeding_dropout_calls_few_functions() -> None:
    assert calls_of(lambda: seed_dropout(seed=1, batch=2, micro_batch=3)) < CALLS_PER_SEED


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_dropout_is_that_of_torchs_own_seed(seed: int, device: str) -> None:
    ones = torch.ones(1000, device=device)
    seed_dropout(seed, batch=2, micro_batch=3)
    found = torch.nn.functional.dropout(ones)
    torch.manual_seed(int(philox(seed, 2, stream=(DROPOUT_STREAM, 3)).random_raw()))
    assert torch.equal(found, torch.nn.functional.dropout(ones))
