"""Dynamic masking: the masked tokens of a row are a pure function of (seed, epoch, row).

Every draw comes from NumPy's Philox counter generator, keyed by (seed, epoch) and started at the row's own counter. A
draw therefore does not depend on rank, world size, micro-batch, worker or restart. Masking uses raw 64-bit words,
because NumPy guarantees their stream across versions.

Tokens are drawn without replacement, with probability proportional to count(token)^-smoothing, by default 0.7
(Sanh et al. 2019, following Lample & Conneau 2019). With weights w_i and standard exponential E_i, the k smallest
E_i / w_i are such a draw (Efraimidis & Spirakis 2006).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

MASKED_FRACTION = 0.15
SMOOTHING = 0.7
# Keeps the weight of every token above 0 in float64, also of a token with 2^63 occurrences.
LARGEST_SMOOTHING = 10
MASK_SHARE = 0.8
KEEP_SHARE = 0.1
IGNORE_INDEX = -100


@dataclass(frozen=True)
class MaskingRule:
    """The parameters of masking that depend on the corpus.

    Attributes:
        sampling_weights: float64 [vocabulary], count(token)^-smoothing; 0 for special tokens.
        mask_token_id: the id of [MASK].
    """

    sampling_weights: NDArray[np.float64]
    mask_token_id: int

    @property
    def vocab_size(self) -> int:
        return len(self.sampling_weights)

    def uniform(self) -> "MaskingRule":
        """Return the rule that prefers no token, as in BERT (Devlin et al. 2019)."""
        return replace(self, sampling_weights=(self.sampling_weights > 0).astype(np.float64))


def masking_rule(
    token_counts: NDArray[np.int64], special_ids: list[int], mask_token_id: int, smoothing: float = SMOOTHING
) -> MaskingRule:
    """Make the rule from the token counts (int64 [vocabulary]) of the training rows.

    A token that is not in the training rows gets count 1, as in DistilBERT's code. ``smoothing`` is from 0, which
    prefers no token, to ``LARGEST_SMOOTHING``.
    """
    weights = np.maximum(token_counts, 1).astype(np.float64) ** -smoothing
    weights[special_ids] = 0.0
    return MaskingRule(weights, mask_token_id)


def masked_token_count(
    real_tokens: NDArray[np.integer], maskable_tokens: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return the number of masked tokens per row: 15 % of its real tokens, rounded up, at most its maskable tokens.

    The count depends on the row alone, so every rank knows the count of the global batch without communication.
    """
    return np.minimum(np.ceil(MASKED_FRACTION * real_tokens).astype(np.int64), maskable_tokens)


def philox(seed: int, epoch: int, stream: tuple[int, int]) -> np.random.Philox:
    """Return a counter-based generator, keyed by (seed, epoch) and started at the counter of ``stream``.

    Streams do not overlap: each has 2^128 draws. All arguments are from 0 to 2^64 - 1.
    """
    # NumPy converts lists of large integers to float; uint64 arrays stay exact.
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, *stream], np.uint64)
    return np.random.Philox(key=key, counter=counter)


def mask_rows(
    input_ids: NDArray[np.int64],
    real_tokens: NDArray[np.integer],
    rule: MaskingRule,
    seed: int,
    epochs: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask rows: of the chosen tokens, 80 % become [MASK], 10 % stay, and 10 % become a random token.

    Args:
        input_ids: int64 [rows, length].
        real_tokens: integers [rows]; so many tokens at the start of each row are real, the rest is padding.
        epochs, rows: int64 [rows]; with ``seed`` they determine the draws of each row.

    Returns:
        the masked ids and the labels, int64 [rows, length] each; the label is -100 for tokens that were not chosen.
    """
    words = _random_words(seed, epochs, rows, real_tokens, input_ids.shape[1])
    draw, action, replacement = (words >> np.uint64(11)) * 2.0**-53

    is_real = np.arange(input_ids.shape[1]) < real_tokens[:, None]
    weights = np.where(is_real, rule.sampling_weights[input_ids], 0.0)
    maskable = weights > 0
    arrival = np.full(input_ids.shape, np.inf)
    np.divide(-np.log1p(-draw), weights, out=arrival, where=maskable)
    chosen = smallest(arrival, masked_token_count(real_tokens, maskable.sum(axis=1)))

    labels = np.where(chosen, input_ids, IGNORE_INDEX)
    masked = np.where(chosen & (action < MASK_SHARE), rule.mask_token_id, input_ids)
    to_random = chosen & (action >= MASK_SHARE + KEEP_SHARE)
    masked[to_random] = (replacement[to_random] * rule.vocab_size).astype(np.int64)
    return masked, labels


def _random_words(
    seed: int,
    epochs: NDArray[np.int64],
    rows: NDArray[np.int64],
    real_tokens: NDArray[np.integer],
    length: int,
) -> NDArray[np.uint64]:
    """Return three words for each real token, uint64 [3, rows, length]; 0 on padding.

    The stream of a row has the first words of all its real tokens, then the second words, then the third.
    """
    words = np.zeros((3, len(rows), length), np.uint64)
    # Setting the state takes a fifth of the time of making a generator.
    generator = philox(seed, epoch=0, stream=(0, 0))
    start = generator.state
    key, counter = start["state"]["key"], start["state"]["counter"]
    of_rows = zip(epochs.tolist(), rows.tolist(), real_tokens.tolist(), strict=True)
    for place, (epoch, row, tokens) in enumerate(of_rows):
        key[1], counter[3] = epoch, row
        generator.state = start
        words[:, place, :tokens] = generator.random_raw(3 * tokens).reshape(3, tokens)
    return words


def smallest(values: NDArray[np.float64], count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which values of each row are its ``count`` smallest; of equal values, the first ones.

    Args:
        values: float64 [rows, length], without NaN.
        count: int64 [rows], from 0 to the length.

    Returns:
        bool [rows, length].
    """
    largest = np.sort(values)[np.arange(len(values)), np.maximum(count, 1) - 1]
    chosen = values <= largest[:, None]
    for row in np.flatnonzero(chosen.sum(axis=1) > count):  # equal values, or a count of 0
        chosen[row] = False
        chosen[row, np.argsort(values[row], kind="stable")[: count[row]]] = True
    return chosen
