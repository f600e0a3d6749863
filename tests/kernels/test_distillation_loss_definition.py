"""The distillation loss against its float64 definition, on ordinary and hostile logits.

Run as it is this file exercises the chunked implementation, on a GPU also the Triton kernels;
test_triton_kernels.py runs it once more under Triton's interpreter.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distilspeed.kernels import reference
from distilspeed.kernels.backend import INTERPRETED
from distilspeed.kernels.distillation_loss import DistillationLosses, distillation_loss

# Half the distance between neighbouring numbers, relative: the most that rounding the gradient to the
# logits' dtype costs per entry, and so in norm (float16 has 11 significant bits, bfloat16 8). The
# interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
SMALLEST_HALF_STEP = {torch.float32: 0.0, torch.float16: 2**-25, torch.bfloat16: 0.0}
FLOAT32_ERROR = 1e-6

LOSS_WEIGHTS = (1.5, 0.5, 2.0)  # of kl, soft_ce, hard_ce: unequal, so that none can stand in for another


@dataclass(frozen=True)
class Case:
    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None
    soft_mask: Tensor | None
    temperature: float
    vocab_size: int
    gradient_scale: float

    def options(self) -> dict[str, object]:
        return {
            "temperature": self.temperature,
            "soft_mask": self.soft_mask,
            "vocab_size": self.vocab_size,
        }


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
        one_hot = torch.full(shape, -math.inf, dtype=torch.float64)
        one_hot[..., 0] = 0
        return student, one_hot
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


def lay_out(logits: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "rows apart":
        return torch.cat((logits, torch.full_like(logits[..., :1], math.nan)), -1)[..., :-1]
    if layout == "transposed":
        return logits.transpose(0, -1).contiguous().transpose(0, -1)
    return logits.contiguous()


def cast(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.where(logits != LOWEST_OF_ANY_DTYPE, torch.finfo(dtype).min).to(dtype)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, device: str) -> Case:
    # Few distinct widths: on a GPU each is a compilation.
    vocab_size = draw(st.sampled_from([1, 3, 16, 37, 64]), label="vocab_size")
    padding = draw(st.sampled_from([0, 1, 11]), label="padding")
    leading = draw(st.sampled_from([(1,), (7,), (2, 4)]), label="leading shape")
    kind = draw(st.sampled_from(KINDS), label="kind")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31), label="seed"))

    student, teacher = make_logits(kind, (*leading, vocab_size), generator)
    junk = torch.full((*leading, padding), draw(st.sampled_from([0.0, 1e4, math.nan])), dtype=torch.float64)
    student, teacher = (cast(torch.cat((logits, junk), -1), dtype) for logits in (student, teacher))

    labels, soft_mask = None, None
    if draw(st.booleans(), label="with labels"):
        labels = torch.randint(0, vocab_size, leading, generator=generator)
        labels[torch.rand(leading, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
    if draw(st.booleans(), label="with soft mask"):
        soft_mask = torch.rand(leading, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Case(
        lay_out(student.to(device), draw(st.sampled_from(["contiguous", "rows apart", "transposed"]))),
        lay_out(teacher.to(device), draw(st.sampled_from(["contiguous", "rows apart", "transposed"]))),
        None if labels is None else labels.to(device),
        None if soft_mask is None else soft_mask.to(device),
        draw(st.floats(0.5, 20), label="temperature"),
        vocab_size,
        draw(st.sampled_from([1.0, 2.0**9]), label="gradient scale"),
    )


def differentiate(losses: DistillationLosses, student_logits: Tensor, scale: float) -> Tensor:
    total = sum(weight * loss for weight, loss in zip(LOSS_WEIGHTS, losses, strict=True))
    (gradient,) = torch.autograd.grad(scale * total, student_logits)
    return gradient


def magnitude_before_cancellation(case: Case) -> float:
    """Norm of the softmaxes whose difference the gradient is: what float32 errors are relative to."""
    soft_rows = (
        case.soft_mask if case.soft_mask is not None else torch.ones_like(case.student_logits[..., 0]) > 0
    )
    student = case.student_logits[..., : case.vocab_size].double()
    teacher = case.teacher_logits[..., : case.vocab_size].double()
    q = torch.softmax(student[soft_rows] / case.temperature, -1)
    p = torch.softmax(teacher[soft_rows] / case.temperature, -1)
    soft_weight = (LOSS_WEIGHTS[0] + LOSS_WEIGHTS[1]) * case.temperature / max(1, int(soft_rows.sum()))
    magnitude = soft_weight * (q.norm() + p.norm())
    if case.labels is not None:
        labelled = case.labels != -100
        hard_weight = LOSS_WEIGHTS[2] / max(1, int(labelled.sum()))
        magnitude += hard_weight * torch.softmax(student[labelled], -1).norm()
    return case.gradient_scale * float(magnitude.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("several_tiles_and_blocks")
def test_losses_and_gradients_are_those_of_the_definition(dtype: torch.dtype, device: str) -> None:
    @settings(max_examples=25 if INTERPRETED else 100, deadline=None, derandomize=True, database=None)
    @given(case=cases(dtype, device))
    def check(case: Case) -> None:
        student = case.student_logits.requires_grad_()
        exact_student = case.student_logits.detach().double().requires_grad_()
        losses = distillation_loss(student, case.teacher_logits, case.labels, **case.options())
        gradient = differentiate(losses, student, case.gradient_scale)
        exact = reference.distillation_loss(
            exact_student, case.teacher_logits.double(), case.labels, **case.options()
        )
        exact_gradient = differentiate(exact, exact_student, case.gradient_scale)

        # kl is a difference of terms as large as soft_ce, so its error is relative to that.
        size = {"kl": exact.kl + exact.soft_ce, "soft_ce": exact.soft_ce, "hard_ce": exact.hard_ce}
        for name, loss, exact_loss in zip(losses._fields, losses, exact, strict=True):
            assert loss.dtype == torch.float32
            if exact_loss > 1e36:  # infinite, or made of rows whose sum may pass float32's range
                assert loss > 1e36, name
                assert loss.isinf() or exact_loss.isfinite(), name
            else:
                tolerance = FLOAT32_ERROR * (case.temperature**2 + float(size[name].detach()))
                assert abs(loss.double() - exact_loss) <= tolerance, name

        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        error = (gradient.double() - exact_gradient).norm()
        tolerance = FLOAT32_ERROR * magnitude_before_cancellation(case)
        tolerance += ROUNDING[dtype] * float(exact_gradient.norm())
        tolerance += SMALLEST_HALF_STEP[dtype] * math.sqrt(gradient.numel())
        assert error <= tolerance
        assert (gradient[..., case.vocab_size :] == 0).all()

    check()
