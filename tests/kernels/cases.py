"""Inputs for the tests of the distillation losses, and the tolerances of their results."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from distilspeed.kernels.implementation.backend import INTERPRETED

# Half the relative distance between neighbouring numbers: the largest relative error of rounding the gradient to
# the logits' dtype, per entry and so in norm (float16 has 11 significant bits, bfloat16 8). The interpreter
# truncates to bfloat16 instead of rounding.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
SMALLEST_HALF_STEP = {torch.float32: 0.0, torch.float16: 2**-25, torch.bfloat16: 0.0}
FLOAT32_ERROR = 1e-6


@dataclass(frozen=True)
class Case:
    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None
    soft_mask: Tensor | None
    temperature: float
    vocab_size: int
    gradient_scale: float

    def options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "soft_mask": self.soft_mask,
            "vocab_size": self.vocab_size,
        }


def random_logits(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    student, teacher = ordinary(shape, torch.Generator().manual_seed(1))
    return student.to(device, dtype), teacher.to(device, dtype)


def ordinary(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return (
        2 * torch.randn(shape, generator=generator, dtype=torch.float64),
        2 * torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def make_logits(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    student, teacher = ordinary(shape, generator)
    chosen = torch.rand(shape, generator=generator) < 0.3
    chosen[..., 0] = False  # a row without a finite logit is undefined
    if kind == "extreme":
        return 5e3 * student.sign(), 5e3 * teacher.sign() + student
    if kind == "both rule classes out":
        return student.masked_fill(chosen, -math.inf), teacher.masked_fill(chosen, -math.inf)
    if kind == "classes filled with the lowest number":
        return student.masked_fill(chosen, LOWEST_OF_ANY_DTYPE), teacher.masked_fill(
            chosen, LOWEST_OF_ANY_DTYPE
        )
    if kind == "student rules classes out":
        return student.masked_fill(chosen, -math.inf), teacher
    if kind == "one-hot teacher":
        one_hot_logits = torch.full(shape, -math.inf, dtype=torch.float64)
        one_hot_logits[..., 0] = 0
        return student, one_hot_logits
    if kind == "uniform rows":
        return student.fill_(7.0), teacher.fill_(-3.0)
    if kind == "student equals teacher":
        return student, student.clone()
    return student, teacher


LOWEST_OF_ANY_DTYPE = -1e300  # becomes the lowest finite number of the case's dtype

KINDS = (
    "ordinary",
    "extreme",
    "both rule classes out",
    "classes filled with the lowest number",
    "student rules classes out",
    "one-hot teacher",
    "uniform rows",
    "student equals teacher",
)
LAYOUTS = ("contiguous", "rows apart", "transposed")


def lay_out(matrix: Tensor, layout: str) -> Tensor:
    """Return the same numbers in another memory layout."""
    if layout == "rows apart":
        return torch.cat((matrix, torch.full_like(matrix[..., :1], math.nan)), -1)[..., :-1]
    if layout == "transposed":
        return matrix.transpose(0, -1).contiguous().transpose(0, -1)
    return matrix.contiguous()


def cast(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.where(logits != LOWEST_OF_ANY_DTYPE, torch.finfo(dtype).min).to(dtype)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, device: str) -> Case:
    # Few distinct widths: on a GPU each needs a compilation.
    vocab_size = draw(st.sampled_from([1, 3, 16, 37, 64]), label="vocab_size")
    padding = draw(st.sampled_from([0, 1, 11]), label="padding")
    teacher_padding = draw(st.sampled_from([padding, 0, 21]), label="teacher's padding")
    leading = draw(st.sampled_from([(1,), (7,), (2, 4)]), label="leading shape")
    kind = draw(st.sampled_from(KINDS), label="kind")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed"))

    student, teacher = make_logits(kind, (*leading, vocab_size), generator)
    junk = draw(st.sampled_from([0.0, 1e4, math.inf, math.nan]), label="junk")
    student, teacher = (
        cast(torch.cat((logits, torch.full((*leading, columns), junk, dtype=torch.float64)), -1), dtype)
        for logits, columns in ((student, padding), (teacher, teacher_padding))
    )
    labels, soft_mask = draw(labels_and_masks(leading, vocab_size, generator))
    return Case(
        lay_out(student.to(device), draw(st.sampled_from(LAYOUTS))),
        lay_out(teacher.to(device), draw(st.sampled_from(LAYOUTS))),
        None if labels is None else labels.to(device),
        None if soft_mask is None else soft_mask.to(device),
        draw(st.floats(0.5, 20), label="temperature"),
        vocab_size,
        draw(st.sampled_from([1.0, 2.0**9]), label="gradient scale"),
    )


@st.composite
def labels_and_masks(
    draw: st.DrawFn, shape: tuple[int, ...], vocab_size: int, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    labels, soft_mask = None, None
    if draw(st.booleans(), label="with labels"):
        labels = torch.randint(0, vocab_size, shape, generator=generator)
        labels[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
    if draw(st.booleans(), label="with soft mask"):
        soft_mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return labels, soft_mask


def terms_of_gradient(case: Case, soft_weight: float, hard_weight: float) -> Tensor:
    """Return the sum of the gradient's softmaxes and one-hot labels, all positive: [..., vocabulary], float64.

    Errors are relative to this sum: where terms cancel, float32 cannot be more accurate.
    """
    student, teacher = (
        logits.detach()[..., : case.vocab_size].double()
        for logits in (case.student_logits, case.teacher_logits)
    )
    soft = torch.ones_like(student[..., 0]) > 0 if case.soft_mask is None else case.soft_mask
    q, p = (torch.softmax(logits[soft] / case.temperature, -1) for logits in (student, teacher))
    terms = torch.zeros_like(student)
    terms[soft] = soft_weight * case.temperature / max(1, int(soft.sum())) * (q + p)
    if case.labels is not None:
        labelled = case.labels != -100
        targets = one_hot(case.labels[labelled], case.vocab_size)
        hard_terms = torch.softmax(student[labelled], -1) + targets
        terms[labelled] += hard_weight / max(1, int(labelled.sum())) * hard_terms
    return case.gradient_scale * terms


class Parts(Protocol):
    """The losses that all distillation losses return."""

    @property
    def kl(self) -> Tensor: ...
    @property
    def soft_ce(self) -> Tensor: ...
    @property
    def hard_ce(self) -> Tensor: ...


def assert_parts_are_exact(parts: Parts, exact: Parts, temperature: float, error: float) -> None:
    """Compare the losses; kl's ``error`` is relative to soft_ce, too: kl is a difference of terms that large."""
    size = {"kl": exact.kl + exact.soft_ce, "soft_ce": exact.soft_ce, "hard_ce": exact.hard_ce}
    for name in size:
        loss, exact_loss = getattr(parts, name), getattr(exact, name)
        assert loss.dtype == torch.float32
        if exact_loss > 1e36:  # infinite, or a sum of rows that may overflow float32
            assert loss > 1e36, name
            assert loss.isinf() or exact_loss.isfinite(), name
        else:
            tolerance = error * (temperature**2 + float(size[name].detach()))
            assert abs(loss.double() - exact_loss) <= tolerance, name
