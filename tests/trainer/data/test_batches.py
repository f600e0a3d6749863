"""The rows of a batch do not depend on how it is split, nor on the step at which a run was resumed."""

import itertools
import math
import os
import socket
import sys
from multiprocessing import forkserver, resource_sharer
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches, _start_worker, resolve_num_workers, total_steps
from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import MicroBatch, document_layout, document_starts
from distilspeed.trainer.job.processes import STOP_SIGNALS

SPLITS = [(24, 1, 1), (12, 2, 1), (6, 2, 2), (2, 4, 3), (1, 24, 1), (8, 1, 3)]


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


OF_ROWS, COUNTS = MicroBatch._fields[:5], ("real_tokens", "labelled_tokens")


def global_batch(corpus: Corpus, micro: int, accumulation: int, world: int, step: int, seed: int = 5) -> dict:
    """Return all rows of one global batch, sorted by row id, and its counts."""
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
def test_a_global_batch_does_not_depend_on_how_it_is_split(
    corpus: Corpus, split: tuple[int, int, int]
) -> None:
    for step in (0, 3):
        whole, divided = global_batch(corpus, *SPLITS[0], step=step), global_batch(corpus, *split, step=step)
        for name in OF_ROWS:
            assert torch.equal(whole[name], divided[name]), name
        for name in COUNTS:
            assert whole[name] == divided[name], name


def test_the_counts_are_those_of_the_whole_global_batch(corpus: Corpus) -> None:
    batch = global_batch(corpus, 6, 2, 2, step=1)
    assert batch["real_tokens"] == {float((batch["document_ids"] >= 0).sum())}
    assert batch["labelled_tokens"] == {float((batch["labels"] != IGNORE_INDEX).sum())}


def test_every_epoch_has_every_row_once_and_in_another_order(corpus: Corpus) -> None:
    rows = len(corpus.train)
    batches = MicroBatches(corpus, BatchEquation(1, 1, 1, 1), rank=0, seed=0)
    order = [int(batches.global_batch(step)[1][0]) for step in range(2 * rows)]
    assert sorted(order[:rows]) == sorted(order[rows:]) == list(range(rows))
    assert order[:rows] != order[rows:]


def test_a_global_batch_may_span_two_epochs(corpus: Corpus) -> None:
    rows = len(corpus.train)
    size = rows - 5
    batches = MicroBatches(corpus, BatchEquation(size, size, 1, 1), rank=0, seed=0)
    epochs, _ = batches.global_batch(1)
    assert epochs.tolist() == [0] * 5 + [1] * (size - 5)


def test_resuming_at_a_step_gives_the_same_batches_as_a_straight_run(corpus: Corpus) -> None:
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
def test_a_gpu_has_two_workers_by_default(asked: int | None, device: str, num_workers: int) -> None:
    assert resolve_num_workers(asked, torch.device(device)) == num_workers


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_workers_make_the_same_batches_and_ignore_signals(corpus: Corpus, start_method: str) -> None:
    batches = MicroBatches(corpus, BatchEquation(8, 2, 2, 2), rank=1, seed=3)
    expected = list(batches.loader(0, 6, num_workers=0))
    loader = batches.loader(0, 6, num_workers=2)
    loader.multiprocessing_context = start_method
    found = iter(loader)
    processes = [worker.pid for worker in found._workers]
    if start_method == "forkserver":
        processes.append(forkserver._forkserver._forkserver_pid)
    for process in processes:  # while they start
        for stop in STOP_SIGNALS:
            os.kill(process, stop)
    for batch in expected:
        assert all(torch.equal(a, b) for a, b in zip(batch, next(found), strict=True))


def test_a_worker_prints_nothing_if_the_trainer_dies_while_it_receives_a_batch(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hung_up = []

    def hang_up(address_and_key: tuple[str, int]) -> NoReturn:
        address, _ = address_and_key
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
        hung_up.append(address)
        raise EOFError

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(hang_up))
    batches = iter(
        MicroBatches(corpus, BatchEquation(1, 1, 1, 1), rank=0, seed=3).loader(0, 2, num_workers=1)
    )
    with pytest.raises(EOFError):
        next(batches)
    (worker,) = batches._workers
    batches._shutdown_workers()
    assert (worker.exitcode, len(hung_up)) == (0, 1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("a fault"), OSError(24, "Too many open files")])
def test_a_worker_shows_real_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *about: shown.append(about[1]))
    _start_worker(0)
    sys.excepthook(type(error), error, None)
    sys.excepthook(ConnectionResetError, ConnectionResetError(), None)
    sys.excepthook(OSError, OSError("got end of file during message"), None)
    assert shown == [error]


def test_the_labelled_places_include_every_labelled_token_and_have_a_fixed_length(corpus: Corpus) -> None:
    equation = BatchEquation(6, 6, 1, 1)
    for batch in MicroBatches(corpus, equation, rank=0, seed=0).loader(0, 4, num_workers=0):
        rows, length = batch.labels.shape
        assert batch.labelled_places.shape == (rows * math.ceil(0.15 * length),)
        assert len(set(batch.labelled_places.tolist())) == len(batch.labelled_places)
        found = batch.labels.flatten()[batch.labelled_places]
        assert (found != IGNORE_INDEX).sum() == (batch.labels != IGNORE_INDEX).sum()


def test_documents_are_numbered_and_positions_restart_in_each() -> None:
    document_ids, position_ids = document_layout([np.array([3, 2]), np.array([6])], row_length=6)
    assert document_ids.tolist() == [[0, 0, 0, 1, 1, -1], [0] * 6]
    assert position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@given(
    rows=st.lists(
        st.lists(st.integers(1, 9), min_size=1, max_size=4).map(lambda lengths: np.array(lengths, np.int64)),
        min_size=1,
        max_size=5,
    )
)
def test_rows_are_laid_out_as_one_by_one(rows: list[np.ndarray]) -> None:
    document_ids, position_ids = document_layout(rows, row_length=36)
    assert document_ids.dtype == position_ids.dtype == np.int64
    for row, lengths in enumerate(rows):
        padding = 36 - lengths.sum()
        ids = [document for document, length in enumerate(lengths) for _ in range(length)]
        positions = [position for length in lengths for position in range(length)]
        assert document_ids[row].tolist() == ids + [-1] * padding
        assert position_ids[row].tolist() == positions + [0] * padding

    starts = document_starts(document_ids, most_documents=4)
    assert (starts.dtype, starts.shape) == (np.int32, (len(rows) * 5 + 1,))
    parts = [length for lengths in rows for length in (*lengths, 36 - lengths.sum()) if length]
    assert starts.tolist() == list(itertools.accumulate(parts, initial=0)) + [36 * len(rows)] * (
        len(starts) - len(parts) - 1
    )


def test_the_starts_of_all_micro_batches_have_one_shape_and_room_for_every_row(corpus: Corpus) -> None:
    batches = MicroBatches(corpus, BatchEquation(6, 6, 1, 1), rank=0, seed=0)
    longest = max(len(lengths) for lengths in corpus.train["document_lengths"])
    assert longest > 2
    for batch in batches.loader(0, 4, num_workers=0):
        assert batch.document_starts.shape == (6 * (longest + 1) + 1,)


def test_total_steps() -> None:
    assert total_steps(1000, 64, None, 3.0) == 47
    assert total_steps(1000, 64, 12, 3.0) == 12
    assert total_steps(10, 64, None, 0.5) == 1
