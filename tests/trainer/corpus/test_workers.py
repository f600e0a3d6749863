"""The worker processes that tokenise and pack."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from distilspeed.trainer.corpus import pool
from distilspeed.trainer.corpus.packing import RowRules
from distilspeed.trainer.corpus.pool import BATCHES_PER_WORKER, PackedBatch, pack_batch, pack_documents
from distilspeed.trainer.corpus.tokenization import DocumentTokenizer
from distilspeed.trainer.job.processes import children_deaf_to

SENTENCE = "the statement is executed when the expression is found to be true"


@pytest.fixture
def backend(small_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))


def rules(backend: Tokenizer, seq_length: int = 64) -> RowRules:
    pad, cls, sep, unk = map(backend.token_to_id, ("[PAD]", "[CLS]", "[SEP]", "[UNK]"))
    return RowRules(seq_length, pad, cls, sep, unk, special_ids=(pad, cls, sep, unk), dtype="uint16")


def pack(documents: Iterable[str], backend: Tokenizer, num_proc: int) -> list[PackedBatch]:
    batches = pack_documents(documents, backend.to_str(), rules(backend), num_proc)
    with contextlib.closing(batches):
        return list(batches)


def test_the_batches_do_not_depend_on_the_number_of_processes(
    reference_text: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "BATCH_CHARACTERS", 50_000)
    documents = reference_text.read_text(encoding="utf-8").splitlines()
    one, three = (pack(documents, backend, num_proc) for num_proc in (1, 3))
    assert len(one) == len(three) > 9
    assert sum(batch.documents for batch in one) == len(documents)
    for single, parallel in zip(one, three, strict=True):
        for column in fields(single.rows):
            np.testing.assert_array_equal(
                getattr(single.rows, column.name), getattr(parallel.rows, column.name)
            )


@pytest.mark.parametrize("seq_length", [128, 512])
def test_padding_of_real_prose_stays_under_two_percent(
    reference_text: Path, backend: Tokenizer, seq_length: int
) -> None:
    documents = reference_text.read_text(encoding="utf-8").splitlines()
    rows = pack_batch(documents, DocumentTokenizer(backend.to_str()), rules(backend, seq_length)).rows
    assert 1 - rows.real_tokens.sum() / rows.input_ids.size < 0.02


def test_documents_are_read_only_as_far_as_the_queue_allows(
    backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "BATCH_CHARACTERS", 100 * (len(SENTENCE) + pool.STRING_OVERHEAD))
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield SENTENCE

    batches = pack_documents(endless(), backend.to_str(), rules(backend), num_proc=2)
    with contextlib.closing(batches):
        for number in range(3):
            assert next(batches).documents == 100
            assert read == 100 * (BATCHES_PER_WORKER * 2 + number)


@pytest.mark.parametrize(("document", "count"), [("word " * 100, 5), ("a", 50)])
def test_a_batch_is_bounded_by_the_memory_of_its_text(
    backend: Tokenizer, monkeypatch: pytest.MonkeyPatch, document: str, count: int
) -> None:
    monkeypatch.setattr(pool, "BATCH_CHARACTERS", 50 * (1 + pool.STRING_OVERHEAD))
    batches = pack([document] * (2 * count + 1), backend, num_proc=1)
    assert [batch.documents for batch in batches] == [count, count, 1]


def test_starting_workers_ignore_signals_from_the_terminal(
    reference_text: Path,
    backend: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pool, "BATCH_CHARACTERS", 10_000)
    text = reference_text.read_text(encoding="utf-8").splitlines()[:1000]
    signalled = set()

    def signalling() -> Iterator[str]:
        for document in text:
            for child in multiprocessing.active_children():
                if child.pid not in signalled:
                    signalled.add(child.pid)
                    os.kill(child.pid, signal.SIGINT)
                    os.kill(child.pid, signal.SIGHUP)
            yield document

    assert sum(batch.documents for batch in pack(signalling(), backend, num_proc=2)) == len(text)
    assert len(signalled) == 2
    assert capfd.readouterr().err == ""


def test_a_signal_during_the_start_of_a_process_is_delivered_afterwards() -> None:
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with children_deaf_to((signal.SIGINT,)):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert not came
    except KeyboardInterrupt:
        came.append(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM, signal.SIGINT]


def test_a_killed_process_ends_the_work_with_an_error(
    backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "BATCH_CHARACTERS", 10_000)

    def killing() -> Iterator[str]:
        for number in range(100_000):
            if number == 10_000:
                for child in multiprocessing.active_children():
                    child.kill()
            yield SENTENCE

    with pytest.raises(BrokenProcessPool):
        pack(killing(), backend, num_proc=2)
