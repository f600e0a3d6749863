"""Inputs for the tests of the linear distillation loss, and the same loss computed from whole logits."""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from cases import LAYOUTS, Case, Parts, labels_and_masks, lay_out, terms_of_gradient
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from distilspeed.kernels import reference
from distilspeed.kernels.distillation_loss import DistillationLosses
from distilspeed.kernels.implementation.backend import INTERPRETED, accumulation_dtype
from distilspeed.kernels.implementation.linear_distillation_loss_ops import Projections
from distilspeed.kernels.linear_distillation_loss import linear_distillation_loss
from distilspeed.kernels.weighted_distillation_loss import WeightedLosses

SOFT_WEIGHT, HARD_WEIGHT = 1.5, 2.0
TEACHER_SIZE = 24
MANY_ROWS = 12 if INTERPRETED else 40  # the interpreter takes 20 ms per row
TRAINED = ("student_hidden", "student_weight", "student_bias")

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class LinearCase:
    projections: Projections
    labels: Tensor | None = None
    soft_mask: Tensor | None = None
    temperature: float = 2.0
    vocab_size: int | None = None
    gradient_scale: float = 1.0

    def options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "soft_mask": self.soft_mask,
            "vocab_size": self.vocab_size,
        }

    def in_dtype(self, dtype: torch.dtype, trained: tuple[str, ...] = TRAINED) -> Self:
        """Return the case in another dtype, with the trained tensors as leaves of the graph."""
        parts = {
            name: None if part is None else part.detach().to(dtype).requires_grad_(name in trained)
            for name, part in self.projections._asdict().items()
        }
        return replace(self, projections=Projections(**parts))

    def gradients(self, loss: Tensor) -> Gradients:
        """Return the gradients of all trained tensors."""
        parts = {name: getattr(self.projections, name) for name in TRAINED}
        parts = {name: part for name, part in parts.items() if part is not None and part.requires_grad}
        gradients = torch.autograd.grad(self.gradient_scale * loss, list(parts.values()))
        return dict(zip(parts, gradients, strict=True))


def linear_loss(case: LinearCase, **options: Any) -> WeightedLosses:
    weights = {"soft_weight": SOFT_WEIGHT, "hard_weight": HARD_WEIGHT}
    return linear_distillation_loss(
        **case.projections._asdict(), labels=case.labels, **weights | case.options() | options
    )


def whole_logits(projections: Projections) -> tuple[Tensor, Tensor]:
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = projections
    student_logits = linear(student_hidden, student_weight, student_bias)
    teacher_logits = linear(teacher_hidden, teacher_weight, teacher_bias)
    dtype = accumulation_dtype(student_logits)
    return student_logits.to(dtype), teacher_logits.to(dtype)


def whole_loss(case: LinearCase, **normalizers: float) -> DistillationLosses:
    """Return the losses, in float32 or float64, of logits that PyTorch projects in the case's dtype."""
    logits = whole_logits(case.projections)
    return reference.distillation_loss(*logits, case.labels, **case.options(), **normalizers)


def weighted_sum(parts: Parts) -> Tensor:
    return SOFT_WEIGHT * parts.kl + HARD_WEIGHT * parts.hard_ce


def sizes_before_cancellation(case: LinearCase) -> dict[str, float]:
    """Return the norm of each gradient with all its terms positive; see ``terms_of_gradient``."""
    exact = case.in_dtype(torch.float64).projections
    vocab_size = case.vocab_size or exact.student_weight.shape[0]
    settings = (case.labels, case.soft_mask, case.temperature, vocab_size, case.gradient_scale)
    terms = terms_of_gradient(Case(*whole_logits(exact), *settings), SOFT_WEIGHT, HARD_WEIGHT).flatten(0, -2)
    weight = exact.student_weight.detach().abs()[:vocab_size]
    hidden = exact.student_hidden.detach().abs().flatten(0, -2)
    norms = (terms @ weight, terms.T @ hidden, terms.sum(0))
    return {name: float(norm.norm()) for name, norm in zip(TRAINED, norms, strict=True)}


def largest_logit(case: LinearCase) -> float:
    sizes = (logits.detach().abs() for logits in whole_logits(case.projections))
    return max((float(size.max()) for size in sizes if size.numel() > 0), default=0.0)


@st.composite
def linear_cases(draw: st.DrawFn, dtype: torch.dtype, device: str) -> LinearCase:
    leading = draw(st.sampled_from([(0,), (1,), (7,), (MANY_ROWS,), (2, 4)]), label="leading shape")
    width = draw(st.sampled_from([1, 37, 64]), label="width")
    vocab_size = width - draw(st.sampled_from([0, 7 if width > 7 else 0]), label="padding")
    teacher_width = draw(st.sampled_from([width, vocab_size, vocab_size + 40]), label="teacher's width")
    # No odd size except 1: oneDNN's bfloat16 products read one element past such a row, which may be NaN.
    student_size = draw(st.sampled_from([1, 6, 16]), label="student hidden size")
    teacher_size = draw(st.sampled_from([4, 16]), label="teacher hidden size")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed"))

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        numbers = size * torch.randn(shape, generator=generator, dtype=torch.float64)
        return lay_out(numbers.to(device, dtype), draw(st.sampled_from(LAYOUTS)))

    def bias(width: int) -> Tensor | None:
        return normal(width) if draw(st.booleans(), label="with bias") else None

    projections = Projections(
        normal(*leading, student_size),
        normal(width, student_size, size=2 * student_size**-0.5),
        bias(width),
        normal(*leading, teacher_size),
        normal(teacher_width, teacher_size, size=2 * teacher_size**-0.5),
        bias(teacher_width),
    )
    labels, soft_mask = draw(labels_and_masks(leading, vocab_size, generator))
    return LinearCase(
        projections,
        None if labels is None else labels.to(device),
        None if soft_mask is None else soft_mask.to(device),
        draw(st.floats(0.5, 20), label="temperature"),
        vocab_size,
        draw(st.sampled_from([1.0, 2.0**9]), label="gradient scale"),
    )


def random_case(*leading: int, width: int, device: str, student_size: int = 16, **options: Any) -> LinearCase:
    """In float64, with biases and a label in every sixth row."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

    projections = Projections(
        normal(*leading, student_size),
        normal(width, student_size, size=2 * student_size**-0.5),
        normal(width),
        normal(*leading, TEACHER_SIZE),
        normal(width, TEACHER_SIZE, size=2 * TEACHER_SIZE**-0.5),
        normal(width),
    )
    rows = torch.arange(math.prod(leading), device=device).view(leading)
    return LinearCase(projections, torch.where(rows % 6 == 0, rows % width, -100), **options)
