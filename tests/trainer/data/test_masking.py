"""Masking is a function of (seed, epoch, row), and draws tokens as in DistilBERT's recipe."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilspeed.trainer.data.masking import (
    IGNORE_INDEX,
    MASKED_FRACTION,
    SMOOTHING,
    MaskingRule,
    mask_row,
    masked_token_count,
    masking_rule,
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
    ids = np.full(128, 50, dtype=np.int64)
    became_mask = stayed = chosen_tokens = 0
    for row in range(1000):
        masked, labels = mask_row(ids, 128, rule, seed=0, epoch=0, row=row)
        chosen = labels != IGNORE_INDEX
        chosen_tokens += chosen.sum()
        became_mask += (masked[chosen] == MASK).sum()
        stayed += (masked[chosen] == 50).sum()
    # One random token in a hundred is [MASK], and one is the token itself. With 20,000 draws, 4 sigma is 1.1 %.
    assert became_mask / chosen_tokens == pytest.approx(0.8 + 0.1 / VOCABULARY, abs=0.012)
    assert stayed / chosen_tokens == pytest.approx(0.1 + 0.1 / VOCABULARY, abs=0.012)


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
    found = np.zeros(len(ids))
    for row in range(draws):
        _, labels = mask_row(ids, len(ids), rule, seed=0, epoch=0, row=row)
        found += labels != IGNORE_INDEX
    # Each share has a standard error below 0.0036 in both arrays; 4 sigma of the difference is 0.02.
    np.testing.assert_allclose(found / draws, expected / draws, atol=0.02)
