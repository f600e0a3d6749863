"""Masking is a function of (seed, epoch, row), and draws tokens as in DistilBERT's recipe."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilspeed.trainer.data.masking import (
    IGNORE_INDEX,
    KEEP_SHARE,
    LARGEST_SMOOTHING,
    MASK_SHARE,
    MASKED_FRACTION,
    SMOOTHING,
    MaskingRule,
    mask_rows,
    masked_token_count,
    masking_rule,
    philox,
    smallest,
)

VOCABULARY, MASK, SPECIAL = 100, 4, [0, 1, 2, 3, 4]
PINNED_POSITIONS = [6, 8, 15, 32, 36, 38, 43, 52, 55, 56]
COUNTS = np.arange(VOCABULARY, dtype=np.int64) ** 2


@pytest.fixture(scope="module")
def rule() -> MaskingRule:
    return masking_rule(COUNTS, SPECIAL, MASK)


def row_of(real_tokens: int, length: int = 128, seed: int = 0) -> np.ndarray:
    row = np.zeros(length, dtype=np.int64)
    row[:real_tokens] = np.random.default_rng(seed).integers(0, VOCABULARY, real_tokens)
    return row


def mask_row(
    ids: np.ndarray, real_tokens: int, rule: MaskingRule, seed: int, epoch: int, row: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mask a micro-batch of one row; return its masked ids and labels."""
    masked, labels = mask_rows(
        ids[None], np.array([real_tokens]), rule, seed, epochs=np.array([epoch]), rows=np.array([row])
    )
    return masked[0], labels[0]


def reference_mask_row(
    ids: np.ndarray, real_tokens: int, rule: MaskingRule, seed: int, epoch: int, row: int
) -> tuple[np.ndarray, np.ndarray]:
    """The definition of masking, for one row with a generator of its own."""
    words = philox(seed, epoch, stream=(0, row)).random_raw(3 * real_tokens)
    uniform = (words >> np.uint64(11)) * 2.0**-53
    draw, action, replacement = uniform.reshape(3, real_tokens)

    weights = rule.sampling_weights[ids[:real_tokens]]
    maskable = weights > 0
    arrival = np.full(real_tokens, np.inf)
    arrival[maskable] = -np.log1p(-draw[maskable]) / weights[maskable]
    count = int(masked_token_count(np.array(real_tokens), maskable.sum()))
    chosen = np.argsort(arrival, kind="stable")[:count]

    masked, labels = ids.copy(), np.full_like(ids, IGNORE_INDEX)
    labels[chosen] = ids[chosen]
    to_mask = chosen[action[chosen] < MASK_SHARE]
    to_random = chosen[action[chosen] >= MASK_SHARE + KEEP_SHARE]
    masked[to_mask] = rule.mask_token_id
    masked[to_random] = (replacement[to_random] * rule.vocab_size).astype(np.int64)
    return masked, labels


# Rows are few, so that micro-batches with the same row twice, in two epochs, are among the examples.
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 67), st.integers(0, 3), st.sampled_from([0, 1, 2, 2**40])), min_size=1
    ),
    seed=st.integers(0, 2**64 - 1),
    length=st.sampled_from([67, 128]),
)
def test_rows_of_a_micro_batch_are_masked_bit_for_bit_as_one_by_one(
    rows: list[tuple[int, int, int]], seed: int, length: int
) -> None:
    rule = masking_rule(COUNTS, SPECIAL, MASK)
    # Tokens of every kind, also after the real ones.
    ids = np.random.default_rng(len(rows)).integers(0, VOCABULARY, (len(rows), length))
    real_tokens, epochs, row_ids = np.array(rows).T
    masked, labels = mask_rows(ids, real_tokens, rule, seed, epochs, row_ids)
    assert masked.dtype == labels.dtype == np.int64
    for place, (tokens, epoch, row) in enumerate(rows):
        expected_ids, expected_labels = reference_mask_row(ids[place], tokens, rule, seed, epoch, row)
        np.testing.assert_array_equal(masked[place], expected_ids)
        np.testing.assert_array_equal(labels[place], expected_labels)


@given(
    values=st.lists(st.lists(st.sampled_from([0.5, 1.0, 2.0, np.inf]), min_size=9, max_size=9), min_size=1),
    data=st.data(),
)
def test_of_equal_arrivals_the_first_tokens_are_chosen(
    values: list[list[float]], data: st.DataObject
) -> None:
    count = np.array([data.draw(st.integers(0, 9)) for _ in values])
    chosen = smallest(np.array(values), count)
    for row, row_count in enumerate(count):
        expected = np.argsort(values[row], kind="stable")[:row_count]
        assert np.flatnonzero(chosen[row]).tolist() == sorted(expected.tolist())


@given(
    real_tokens=st.integers(0, 128),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 99),
    row=st.integers(0, 2**40),
)
def test_exactly_the_counted_tokens_are_masked_and_only_ordinary_ones(
    real_tokens: int, seed: int, epoch: int, row: int
) -> None:
    rule = masking_rule(COUNTS, SPECIAL, MASK)
    ids = row_of(real_tokens, seed=seed)
    masked, labels = mask_row(ids, real_tokens, rule, seed, epoch, row)
    chosen = labels != IGNORE_INDEX
    maskable = ~np.isin(ids[:real_tokens], SPECIAL)
    assert chosen.sum() == masked_token_count(np.array(real_tokens), maskable.sum())
    assert not chosen[real_tokens:].any()
    assert not np.isin(ids[chosen], SPECIAL).any()
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
    assert masked.min() >= 0
    assert masked.max() < VOCABULARY


def test_a_row_of_ordinary_tokens_has_15_percent_masked() -> None:
    assert masked_token_count(np.array([100, 128, 1, 0]), np.array([98, 126, 0, 0])).tolist() == [
        15,
        20,
        0,
        0,
    ]


def test_seed_epoch_and_row_determine_the_mask(rule: MaskingRule) -> None:
    ids = row_of(128)
    first, _ = mask_row(ids, 128, rule, seed=1, epoch=0, row=7)
    again, _ = mask_row(ids, 128, rule, seed=1, epoch=0, row=7)
    np.testing.assert_array_equal(first, again)
    for other in ({"epoch": 1}, {"seed": 2}, {"row": 8}):
        different, _ = mask_row(ids, 128, rule, **({"seed": 1, "epoch": 0, "row": 7} | other))
        assert (different != first).any(), other


def test_the_stream_is_fixed_across_versions(rule: MaskingRule) -> None:
    # These positions are pinned: a run resumed after an upgrade must mask the same tokens.
    _, labels = mask_row(row_of(64), 64, rule, seed=3, epoch=2, row=1)
    assert np.flatnonzero(labels != IGNORE_INDEX).tolist() == PINNED_POSITIONS


def test_of_the_masked_tokens_80_percent_become_mask_10_stay_10_are_random(rule: MaskingRule) -> None:
    rows = np.arange(1000)
    ids = np.full((len(rows), 128), 50, dtype=np.int64)
    masked, labels = mask_rows(ids, np.full(len(rows), 128), rule, 0, np.zeros_like(rows), rows)
    became = masked[labels != IGNORE_INDEX]
    # One random token in a hundred is [MASK], and one is the token itself. With 20,000 draws, 4 sigma is 1.1 %.
    assert (became == MASK).mean() == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.012)
    assert (became == 50).mean() == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.012)


def test_without_smoothing_no_token_is_preferred(rule: MaskingRule) -> None:
    assert (
        masking_rule(COUNTS, SPECIAL, MASK, smoothing=0).sampling_weights.tolist()
        == rule.uniform().sampling_weights.tolist()
    )


def test_with_the_largest_smoothing_all_counted_tokens_are_masked() -> None:
    frequent = masking_rule(np.full(VOCABULARY, 2**62), SPECIAL, MASK, LARGEST_SMOOTHING)
    ids = np.full(128, 50, dtype=np.int64)
    _, labels = mask_row(ids, 100, frequent, seed=0, epoch=0, row=0)
    assert (labels[:100] != IGNORE_INDEX).sum() == 15
    assert (labels[100:] == IGNORE_INDEX).all()


def test_tokens_are_drawn_as_sequential_weighted_draws_without_replacement(rule: MaskingRule) -> None:
    # 3 of 20 tokens are drawn. The expectation follows the definition, with another generator: draw one token by
    # weight, remove it, repeat.
    ids = np.arange(10, 30, dtype=np.int64)
    count = int(np.ceil(MASKED_FRACTION * len(ids)))
    weights = COUNTS[ids].astype(float) ** -SMOOTHING
    generator, draws = np.random.default_rng(0), 20_000
    expected = np.zeros(len(ids))
    for _ in range(draws):
        expected[generator.choice(len(ids), count, replace=False, p=weights / weights.sum())] += 1
    rows = np.arange(draws)
    _, labels = mask_rows(
        np.tile(ids, (draws, 1)), np.full(draws, len(ids)), rule, 0, np.zeros_like(rows), rows
    )
    found = (labels != IGNORE_INDEX).sum(axis=0)
    # Each share has a standard error below 0.0036 in both arrays; 4 sigma of the difference is 0.02.
    np.testing.assert_allclose(found / draws, expected / draws, atol=0.02)
