"""Rows of a causal corpus are not masked: each token's label is the next token of its document."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from distilspeed.trainer.corpus.format import Corpus, open_corpus, read_rows
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import next_tokens, row_token_counts


@pytest.fixture(scope="module")
def corpus(family_dirs: Callable[[str], Any]) -> Corpus:
    return open_corpus(family_dirs("gpt2").corpus)


def test_labels_are_the_next_tokens_within_each_document() -> None:
    ids = np.array([[5, 6, 7, 8, 9, 1, 1]])
    documents = np.array([[0, 0, 0, 1, 1, -1, -1]])
    assert next_tokens(ids, documents).tolist() == [[6, 7, -100, 9, -100, -100, -100]]


def test_tokens_are_as_stored_and_the_same_in_every_epoch(corpus: Corpus) -> None:
    rows = len(corpus.train)
    batches = MicroBatches(corpus, BatchEquation(rows, rows, 1, 1), rank=0, seed=3)
    for epoch in (batches[0], batches[1]):
        stored = read_rows(corpus.train, epoch.row_ids.tolist())
        assert np.array_equal(epoch.input_ids.numpy(), stored.input_ids)
        of_documents = [
            label
            for ids, lengths in zip(stored.input_ids, stored.document_lengths, strict=True)
            for document in np.split(ids, np.cumsum(lengths))[:-1]
            for label in document[1:]
        ]
        labelled = epoch.labels != IGNORE_INDEX
        assert epoch.labels[labelled].tolist() == of_documents
        # A label stands where the token before it is.
        assert torch.equal(epoch.labels[:, :-1][labelled[:, :-1]], epoch.input_ids[:, 1:][labelled[:, :-1]])
        assert not labelled[:, -1].any()


def test_the_count_of_labels_is_that_of_the_global_batch(corpus: Corpus) -> None:
    parts = [MicroBatches(corpus, BatchEquation(12, 3, 2, 2), rank, seed=0)[0] for rank in (0, 1)]
    parts += [MicroBatches(corpus, BatchEquation(12, 3, 2, 2), rank, seed=0)[1] for rank in (0, 1)]
    labels = sum(int((part.labels != IGNORE_INDEX).sum()) for part in parts)
    assert {float(part.labelled_tokens) for part in parts} == {float(labels)}
    real, labelled = row_token_counts(corpus.train, "causal")
    assert (labelled < real).all()


def test_the_labelled_places_are_all_tokens(corpus: Corpus) -> None:
    batch = MicroBatches(corpus, BatchEquation(4, 4, 1, 1), rank=0, seed=0)[0]
    assert sorted(batch.labelled_places.tolist()) == list(range(batch.labels.numel()))
