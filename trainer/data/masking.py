"""Dynamic masking: the masked tokens of a row are a pure function of (seed, epoch, row).

Every draw comes from NumPy's Philox counter generator, keyed by (seed, epoch) and started at the row's own counter. A
draw therefore does not depend on rank, world size, micro-batch, worker or restart. Masking uses raw 64-bit words,
because NumPy guarantees their stream across versions.

Tokens are drawn without replacement, with probability proportional to count(token)^-0.7 (Sanh et al. 2019, following
Lample & Conneau 2019). With weights w_i and standard exponential E_i, the k smallest E_i / w_i are such a draw
(Efraimidis & Spirakis 2006).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

MASKED_FRACTION = 0.15
SMOOTHING = 0.7
MASK_SHARE = 0.8
KEEP_SHARE = 0.1
IGNORE_INDEX = -100


@dataclass(frozen=True)
class MaskingRule:
    """The parameters of masking that depend on the corpus.

    Attributes:
        sampling_weights: float64 [vocabulary], count(token)^-0.7; 0 for special tokens.
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


def masking_rule(token_counts: NDArray[np.int64], special_ids: list[int], mask_token_id: int) -> MaskingRule:
    """Make the rule from the token counts (int64 [vocabulary]) of the training rows.

    A token that is not in the training rows gets count 1, as in DistilBERT's code.
    """
    weights = np.maximum(token_counts, 1).astype(np.float64) ** -SMOOTHING
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


def mask_row(
    input_ids: NDArray[np.int64], real_tokens: int, rule: MaskingRule, seed: int, epoch: int, row: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask one row: of the chosen tokens, 80 % become [MASK], 10 % stay, and 10 % become a random token.

    Args:
        input_ids: int64 [row length]; the first ``real_tokens`` are real, the rest is padding.

    Returns:
        the masked ids and the labels, int64 [row length] each; the label is -100 for tokens that were not chosen.
    """
    words = philox(seed, epoch, stream=(0, row)).random_raw(3 * real_tokens)
    uniform = (words >> np.uint64(11)) * 2.0**-53
    draw, action, replacement = uniform.reshape(3, real_tokens)

    weights = rule.sampling_weights[input_ids[:real_tokens]]
    maskable = weights > 0
    arrival = np.full(real_tokens, np.inf)
    arrival[maskable] = -np.log1p(-draw[maskable]) / weights[maskable]
    count = int(masked_token_count(np.array(real_tokens), maskable.sum()))
    chosen = np.argsort(arrival, kind="stable")[:count]

    masked, labels = input_ids.copy(), np.full_like(input_ids, IGNORE_INDEX)
    labels[chosen] = input_ids[chosen]
    to_mask = chosen[action[chosen] < MASK_SHARE]
    to_random = chosen[action[chosen] >= MASK_SHARE + KEEP_SHARE]
    masked[to_mask] = rule.mask_token_id
    masked[to_random] = (replacement[to_random] * rule.vocab_size).astype(np.int64)
    return masked, labels
