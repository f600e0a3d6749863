"""The problem of every case: sizes, random inputs, least work."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distilspeed.kernels.profiling.measurement import Case, Floor
from distilspeed.kernels.profiling.peers import IGNORE_INDEX

LABELLED_FRACTION = 0.15
# Standard deviation of the student's logits; the teacher's logits are the student's plus standard normal noise.
LOGIT_SCALE = 3.0


GB_PER_S = "GB/s"
GFLOP_PER_S = "GFLOP/s"


@dataclass(frozen=True)
class Problem:
    """Sizes and kind of the inputs; tokens, vocabulary and hidden size are at least 1."""

    tokens: int
    vocab_size: int
    hidden_size: int
    temperature: float
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Group:
    """Cases that compute the same loss; the first is ours, and the others are compared with it.

    inputs  shapes and dtype, as text
    unit    of rates, floor / seconds / 10^9: GB/s or GFLOP/s
    roof    name of the case whose rate is the roof; None: the copy bandwidth is
    """

    name: str
    inputs: str
    unit: str
    cases: tuple[Case, ...]
    roof: str | None = None


def floor_bytes(rows: int, width: int, dtype: torch.dtype) -> Floor:
    """Forward reads the student's and the teacher's tensor; backward reads both and writes a gradient."""
    tensor = rows * width * dtype.itemsize
    return Floor(2 * tensor, 3 * tensor)


def single_launch_floor_bytes(rows: int, width: int, dtype: torch.dtype) -> Floor:
    """Forward reads both tensors and writes the gradient; backward has no work left."""
    return Floor(3 * rows * width * dtype.itemsize, 0)


def projection_flops(rows: int, vocab_size: int, hidden_size: int) -> Floor:
    """Forward and backward are two matrix products each; a multiply-add is two operations."""
    product = 2 * rows * vocab_size * hidden_size
    return Floor(2 * product, 2 * product)


def random_normal(problem: Problem, generator: torch.Generator, *shape: int) -> Tensor:
    """Return float32 values, so that a sum of two is rounded to the problem's dtype only once."""
    return torch.randn(shape, generator=generator, device=problem.device)


def random_pair(
    problem: Problem, generator: torch.Generator, *shape: int, scale: float, noise: float
) -> tuple[Tensor, Tensor]:
    """Return ``scale`` times normal values, and these plus ``noise`` times others: a student's and a teacher's."""
    exact = scale * random_normal(problem, generator, *shape)
    student = exact.to(problem.dtype, copy=True)
    exact += noise * random_normal(problem, generator, *shape)
    return student, exact.to(problem.dtype)


def random_labels(problem: Problem, generator: torch.Generator) -> Tensor:
    """Return labels [tokens] int64: random classes in 15 % of the rows (at least one), -100 in the others."""
    labels = torch.full((problem.tokens,), IGNORE_INDEX, device=problem.device)
    count = max(1, round(LABELLED_FRACTION * problem.tokens))
    rows = torch.randperm(problem.tokens, generator=generator, device=problem.device)[:count]
    labels[rows] = torch.randint(problem.vocab_size, (count,), generator=generator, device=problem.device)
    return labels


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def non_leaf(tensor: Tensor) -> Tensor:
    """Return a copy that may be overwritten, like the output of a model's last layer."""
    return leaf(tensor) * 1


def shown(problem: Problem, *shapes: tuple[int, int]) -> str:
    return " x ".join(str(list(shape)) for shape in shapes) + f" {str(problem.dtype).removeprefix('torch.')}"
