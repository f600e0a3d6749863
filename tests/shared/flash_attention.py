"""Flash attention's varlen operators for CPUs, from their definition, to test what calls them without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch


@contextmanager
def flash_attention_on_cpus() -> Iterator[list[float]]:
    """Let ``aten::_flash_attention_forward`` and its gradient run on CPUs; yield the dropout of every call.

    The values are those without dropout: random numbers on a CPU cannot be those of a GPU.
    """
    dropouts: list[float] = []

    def forward(q, k, v, starts, _, longest, _longest, dropout, is_causal, debug, **options):
        dropouts.append(dropout)
        output = torch.empty_like(q)
        for document, probabilities in _documents(q, k, starts, longest, is_causal, **options):
            output[document] = torch.einsum("hqk,khd->qhd", probabilities, v[document])
        none = torch.empty(0)
        return output, none, none, none, none

    def backward(
        gradient,
        q,
        k,
        v,
        output,
        lse,
        starts,
        _,
        longest,
        _longest,
        dropout,
        is_causal,
        rng,
        unused,
        **options,
    ):
        dq, dk, dv = (torch.empty_like(states) for states in (q, k, v))
        for document, probabilities in _documents(q, k, starts, longest, is_causal, **options):
            of_output = gradient[document]
            dv[document] = torch.einsum("hqk,qhd->khd", probabilities, of_output)
            of_probabilities = torch.einsum("qhd,khd->hqk", of_output, v[document])
            mean = (of_probabilities * probabilities).sum(-1, keepdim=True)
            of_scores = probabilities * (of_probabilities - mean) * (options["scale"] or q.shape[-1] ** -0.5)
            dq[document] = torch.einsum("hqk,khd->qhd", of_scores, k[document])
            dk[document] = torch.einsum("hqk,qhd->khd", of_scores, q[document])
        return dq, dk, dv

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield dropouts


def _documents(
    q, k, starts, longest, is_causal, scale=None, window_size_left=None, window_size_right=None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield each document's place and its probabilities [heads, queries, keys]."""
    assert (starts[0], starts[-1]) == (0, len(q))
    for start, end in pairwise(starts.tolist()):
        length = end - start
        assert 0 <= length <= longest
        if not length:
            continue
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * (scale or q.shape[-1] ** -0.5)
        seen = torch.ones(length, length, dtype=torch.bool)
        if window_size_left >= 0:
            seen = seen.triu(-window_size_left)
        if window_size_right >= 0:
            seen = seen.tril(window_size_right)
        if is_causal:
            seen = seen.tril()
        yield slice(start, end), scores.masked_fill(~seen, -torch.inf).softmax(-1)
