"""Cutting documents into pieces and packing pieces into rows."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilspeed.trainer.corpus.packing import (
    Pieces,
    RowRules,
    cut_into_pieces,
    lay_out_rows,
    pack_best_fit_decreasing,
)
from distilspeed.trainer.corpus.tokenization import TokenizedDocuments

CLS, SEP, UNK, PAD = 101, 102, 100, 0

capacities_and_lengths = st.integers(1, 600).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=300))
)


def rules(seq_length: int) -> RowRules:
    return RowRules(seq_length, PAD, CLS, SEP, UNK, special_ids=(PAD, UNK, CLS, SEP), dtype="uint16")


def tokenized(documents: list[list[int]]) -> TokenizedDocuments:
    return TokenizedDocuments(
        np.array([token for document in documents for token in document], dtype=np.int32),
        np.array([len(document) for document in documents], dtype=np.int64),
    )


def as_lists(pieces: Pieces) -> list[list[int]]:
    """Return the tokens of each piece, without [CLS] and [SEP]."""
    return [
        pieces.tokens[start : start + length - 2].tolist()
        for start, length in zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)
    ]


@given(capacities_and_lengths)
def test_every_whole_piece_is_in_one_row(capacity_and_lengths: tuple[int, list[int]]) -> None:
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
def test_a_piece_goes_into_the_row_with_the_least_room(capacity_and_lengths: tuple[int, list[int]]) -> None:
    capacity, lengths = capacity_and_lengths
    room: list[int] = []  # room of each row, by the definition of best-fit decreasing: search every row
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


@given(
    st.lists(st.lists(st.sampled_from([UNK, 7, 8, 60_000]), max_size=200), max_size=20), st.integers(16, 64)
)
def test_documents_are_cut_and_pieces_dropped_by_the_definition(
    documents: list[list[int]], seq_length: int
) -> None:
    room = seq_length - 2
    cut = [document[i : i + room] for document in documents for i in range(0, len(document), room)]
    long_enough = [piece for piece in cut if len(piece) + 2 > 11]
    known = [piece for piece in long_enough if piece.count(UNK) < (len(piece) + 2) / 2]
    pieces = cut_into_pieces(tokenized(documents), rules(seq_length))
    assert as_lists(pieces) == known
    assert pieces.dropped_short == len(cut) - len(long_enough)
    assert pieces.dropped_unknown == len(long_enough) - len(known)


def test_pieces_of_up_to_eleven_tokens_are_dropped() -> None:
    pieces = cut_into_pieces(tokenized([[7] * 9, [7] * 10, []]), rules(64))
    assert (pieces.lengths.tolist(), pieces.dropped_short, pieces.dropped_unknown) == ([12], 1, 0)


def test_pieces_at_least_half_unknown_are_dropped() -> None:
    half, less = [UNK] * 10 + [7] * 8, [UNK] * 9 + [7] * 9  # 20 tokens each, with [CLS] and [SEP]
    pieces = cut_into_pieces(tokenized([half, less]), rules(64))
    assert (pieces.dropped_unknown, pieces.dropped_short) == (1, 0)
    assert as_lists(pieces) == [less]


def test_a_special_token_in_the_text_becomes_the_unknown_token() -> None:
    pieces = cut_into_pieces(tokenized([[7] * 8 + [CLS, UNK, PAD, SEP]]), rules(64))
    assert as_lists(pieces) == [[7] * 8 + [UNK] * 4]
    assert pieces.tokens.dtype == np.int32


def test_rows_contain_their_pieces_then_padding() -> None:
    pieces = Pieces(np.array([7, 8, UNK], dtype=np.int32), np.array([0, 1]), np.array([3, 4]), 0, 0)
    packed = lay_out_rows(pieces, [[1, 0], [0]], rules(8))
    assert packed.input_ids.dtype == np.uint16
    assert packed.input_ids.tolist() == [
        [CLS, 8, UNK, SEP, CLS, 7, SEP, PAD],
        [CLS, 7, SEP, PAD, PAD, PAD, PAD, PAD],
    ]
    assert packed.piece_lengths.tolist() == [4, 3, 3]
    assert packed.pieces_per_row.tolist() == [2, 1]
    assert packed.real_tokens.tolist() == [7, 3]
    assert packed.maskable_tokens.tolist() == [2, 1]


@given(st.lists(st.lists(st.integers(200, 300), min_size=10, max_size=100), max_size=30), st.data())
def test_rows_contain_every_piece_once_and_any_rows_can_be_selected(
    documents: list[list[int]], data: st.DataObject
) -> None:
    pieces = cut_into_pieces(tokenized(documents), rules(32))
    packed = lay_out_rows(pieces, pack_best_fit_decreasing(pieces.lengths.tolist(), 32), rules(32))
    rows = len(packed.input_ids)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=bool)
    found: Counter[tuple[int, ...]] = Counter()
    for part in (packed.select(chosen), packed.select(~chosen)):
        ends = np.cumsum(part.pieces_per_row)
        for row, lengths, real in zip(
            part.input_ids, np.split(part.piece_lengths, ends)[:-1], part.real_tokens, strict=True
        ):
            assert lengths.sum() == real
            assert (row[real:] == PAD).all()
            found.update(tuple(piece.tolist()) for piece in np.split(row, np.cumsum(lengths))[:-1])
    assert found == Counter((CLS, *piece, SEP) for piece in as_lists(pieces))
