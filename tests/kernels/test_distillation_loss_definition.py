"""The distillation loss against its float64 definition, on ordinary and hostile logits.

Both implementations for CPUs are tested, and on a GPU the Triton kernels. test_triton_kernels.py also runs it under
Triton's interpreter.
"""

import math

import pytest
import torch
from cases import (
    FLOAT32_ERROR,
    ROUNDING,
    SMALLEST_HALF_STEP,
    Case,
    assert_parts_are_exact,
    cases,
    terms_of_gradient,
)
from hypothesis import given, settings
from torch import Tensor

from distilspeed.kernels import reference
from distilspeed.kernels.distillation_loss import DistillationLosses, distillation_loss
from distilspeed.kernels.implementation.backend import INTERPRETED

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")

LOSS_WEIGHTS = (1.5, 0.5, 2.0)  # of kl, soft_ce, hard_ce: unequal, so that mixing up two losses is noticed


def differentiate(losses: DistillationLosses, student_logits: Tensor, scale: float) -> Tensor:
    total = sum(weight * loss for weight, loss in zip(LOSS_WEIGHTS, losses, strict=True))
    (gradient,) = torch.autograd.grad(scale * total, student_logits)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("several_tiles_and_blocks")
def test_losses_and_gradients_are_those_of_the_definition(dtype: torch.dtype, device: str) -> None:
    @settings(max_examples=25 if INTERPRETED else 100, derandomize=True, database=None)
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

        assert_parts_are_exact(losses, exact, case.temperature, FLOAT32_ERROR)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        error = (gradient.double() - exact_gradient).norm()
        kl_weight, soft_ce_weight, hard_weight = LOSS_WEIGHTS
        tolerance = FLOAT32_ERROR * terms_of_gradient(case, kl_weight + soft_ce_weight, hard_weight).norm()
        tolerance += ROUNDING[dtype] * exact_gradient.norm()
        tolerance += SMALLEST_HALF_STEP[dtype] * math.sqrt(gradient.numel())
        assert error <= tolerance
        assert (gradient[..., case.vocab_size :] == 0).all()

    check()
