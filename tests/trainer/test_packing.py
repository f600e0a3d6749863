"""Splitting documents into pieces, packing pieces into rows, and the processes that tokenise."""

import contextlib
import itertools
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.packing import (
    CHARACTERS_PER_TASK,
    DOCUMENTS_PER_TASK,
    TASKS_PER_WORKER,
    PieceBatch,
    PieceRules,
    keep_pieces,
    lay_out_rows,
    pack_best_fit_decreasing,
    split_into_pieces,
    tokenize_documents,
)

CLS, SEP, UNK, PAD = 101, 102, 100, 0

capacities_and_lengths = st.integers(1, 600).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=300))
)


def rules(seq_length: int) -> PieceRules:
    return PieceRules(seq_length, cls_id=CLS, sep_id=SEP, unk_id=UNK, dtype="uint16")


@given(capacities_and_lengths)
def test_every_piece_is_in_one_row_whole(capacity_and_lengths: tuple[int, list[int]]) -> None:
    capacity, lengths = capacity_and_lengths
    rows = pack_best_fit_decreasing(lengths, capacity)
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))


@given(capacities_and_lengths)
def test_no_row_is_empty_or_over_capacity(capacity_and_lengths: tuple[int, list[int]]) -> None:
    capacity, lengths = capacity_and_lengths
    for row in pack_best_fit_decreasing(lengths, capacity):
        assert 0 < sum(lengths[piece] for piece in row) <= capacity


@given(capacities_and_lengths)
def test_no_two_rows_would_fit_in_one(capacity_and_lengths: tuple[int, list[int]]) -> None:
    capacity, lengths = capacity_and_lengths
    totals = sorted(
        sum(lengths[piece] for piece in row) for row in pack_best_fit_decreasing(lengths, capacity)
    )
    assert sum(totals[:2]) > capacity or len(totals) < 2


@given(capacities_and_lengths)
def test_a_piece_goes_where_the_least_room_is_left(capacity_and_lengths: tuple[int, list[int]]) -> None:
    capacity, lengths = capacity_and_lengths
    room: list[int] = []  # of each row, filled by the definition of best-fit decreasing: look at every row
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, left in enumerate(room) if left >= length]
        if fitting:
            room[min(fitting, key=room.__getitem__)] -= length
        else:
            room.append(capacity - length)
    packed = pack_best_fit_decreasing(lengths, capacity)
    assert sorted(capacity - sum(lengths[piece] for piece in row) for row in packed) == sorted(room)


def test_rows_follow_the_order_of_the_text() -> None:
    assert pack_best_fit_decreasing([3, 9, 5, 10, 2], 10) == [[2, 0, 4], [1], [3]]


@pytest.mark.parametrize("length", [0, 11])
def test_a_length_no_row_can_hold_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack_best_fit_decreasing([length], 10)


@given(st.lists(st.integers(200, 60_000), max_size=300), st.integers(16, 64))
def test_a_long_document_is_cut_into_bracketed_pieces_that_lose_nothing(
    document: list[int], seq_length: int
) -> None:
    pieces = split_into_pieces(document, rules(seq_length))
    assert all(piece[0] == CLS and piece[-1] == SEP and len(piece) <= seq_length for piece in pieces)
    assert all(len(piece) == seq_length for piece in pieces[:-1])
    assert [token for piece in pieces for token in piece[1:-1]] == document


def test_pieces_of_up_to_eleven_tokens_are_dropped() -> None:
    batch = keep_pieces([[7] * 9, [7] * 10, []], rules(64))
    assert (batch.lengths.tolist(), batch.dropped_short, batch.dropped_unknown) == ([12], 1, 0)
    assert batch.documents == 3


def test_pieces_at_least_half_unknown_are_dropped() -> None:
    half, less = [UNK] * 10 + [7] * 8, [UNK] * 9 + [7] * 9  # of 20 tokens, special ones counted
    batch = keep_pieces([half, less], rules(64))
    assert (batch.dropped_unknown, batch.dropped_short) == (1, 0)
    assert batch.tokens.tolist() == [CLS, *less, SEP]


def test_rows_hold_their_pieces_then_padding() -> None:
    pieces = [np.array([CLS, 7, SEP], dtype=np.uint16), np.array([CLS, 8, 9, SEP], dtype=np.uint16)]
    packed = lay_out_rows([[pieces[1], pieces[0]], [pieces[0]]], seq_length=8, pad_id=PAD)
    assert packed.input_ids.dtype == np.uint16
    assert packed.input_ids.tolist() == [
        [CLS, 8, 9, SEP, CLS, 7, SEP, PAD],
        [CLS, 7, SEP, PAD, PAD, PAD, PAD, PAD],
    ]
    assert packed.piece_lengths.tolist() == [4, 3, 3]
    assert packed.pieces_per_row.tolist() == [2, 1]
    assert packed.real_tokens.tolist() == [7, 3]


# --- the processes --------------------------------------------------------------------------------------


def tokenize(documents: Iterator[str] | list[str], tokenizer: Path, num_proc: int) -> list[PieceBatch]:
    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    small = PieceRules(64, *(backend.token_to_id(token) for token in ("[CLS]", "[SEP]", "[UNK]")), "uint16")
    with contextlib.closing(tokenize_documents(documents, backend.to_str(), small, num_proc)) as batches:
        return list(batches)


def test_the_batches_are_the_same_however_many_processes(
    reference_text: Path, small_tokenizer_dir: Path
) -> None:
    documents = reference_text.read_text(encoding="utf-8").splitlines()
    one, three = (tokenize(documents, small_tokenizer_dir, num_proc) for num_proc in (1, 3))
    assert len(one) == len(three) > 3
    for single, parallel in zip(one, three, strict=True):
        np.testing.assert_array_equal(single.tokens, parallel.tokens)
        np.testing.assert_array_equal(single.lengths, parallel.lengths)


@pytest.mark.parametrize("seq_length", [128, 512])
def test_padding_of_real_prose_stays_under_two_percent(
    reference_text: Path, small_tokenizer_dir: Path, seq_length: int
) -> None:
    backend = Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))
    encodings = backend.encode_batch_fast(reference_text.read_text().splitlines(), add_special_tokens=False)
    lengths = keep_pieces((encoding.ids for encoding in encodings), rules(seq_length)).lengths.tolist()
    rows = pack_best_fit_decreasing(lengths, seq_length)
    assert 1 - sum(lengths) / (len(rows) * seq_length) < 0.02


def test_special_tokens_spelled_in_a_text_stay_text(small_tokenizer_dir: Path) -> None:
    backend = Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))
    [batch] = tokenize(["the [MASK] and the [PAD] of a [SEP] in a [CLS]"], small_tokenizer_dir, num_proc=1)
    special = {backend.token_to_id(token) for token in ("[MASK]", "[PAD]", "[SEP]", "[CLS]")}
    assert special.isdisjoint(batch.tokens[1:-1].tolist())


def test_documents_are_read_no_further_than_the_queue_is_long(small_tokenizer_dir: Path) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "the statement is executed when the expression is found to be true"

    backend = Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))
    batches = tokenize_documents(endless(), backend.to_str(), rules(64), num_proc=2)
    with contextlib.closing(batches):
        next(batches)
        assert read <= DOCUMENTS_PER_TASK * TASKS_PER_WORKER * 2


def test_a_task_is_bounded_in_characters_too(small_tokenizer_dir: Path) -> None:
    batches = tokenize(["word " * (CHARACTERS_PER_TASK // 5)] * 3, small_tokenizer_dir, num_proc=1)
    assert [batch.documents for batch in batches] == [1, 1, 1]


def test_a_killed_process_ends_the_work_with_an_error(small_tokenizer_dir: Path) -> None:
    def killing() -> Iterator[str]:
        for number in range(100 * DOCUMENTS_PER_TASK):
            if number == 10 * DOCUMENTS_PER_TASK:
                for child in multiprocessing.active_children():
                    child.kill()
            yield "the statement is executed when the expression is found to be true"

    with pytest.raises(UserError, match="process died"):
        tokenize(killing(), small_tokenizer_dir, num_proc=2)
