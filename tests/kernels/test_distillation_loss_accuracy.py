"""The accuracy of the losses on as many logits as in training, of similar size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from distilspeed.kernels import reference
from distilspeed.kernels.distillation_loss import distillation_loss
from distilspeed.kernels.weighted_distillation_loss import (
    WeightedLosses,
    weighted_distillation_loss,
)

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")

# At temperature 5 a row's kl is 0.02, from sums with float32's relative error of 6e-8. So a row may have an error of
# 1e-5; the mean of 256 rows has 3e-7, and 1e-6 with PyTorch's own losses.
ROWS, VOCAB_SIZE = 256, 30522
SOFT_WEIGHT, HARD_WEIGHT = 5.0, 2.0
LOSS_SCALE = 64.0  # fp16 needs one; with larger scales PyTorch's own losses overflow fp16 at temperature 5
LOSS_ERROR = 1e-6  # in every dtype: the definition gets the rounded logits, too
GRADIENT_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
FLOAT32_STEP = 2**-23  # a smaller error is luck

Losses = Callable[..., WeightedLosses]


def random_rows(rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits like those of a good student and its teacher, and labels in 15 % of the rows."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(rows, VOCAB_SIZE, generator=generator)
    teacher = student + torch.randn(rows, VOCAB_SIZE, generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= 0.15] = -100
    return student.to(device, dtype), teacher.to(device, dtype), labels.to(device)


def weighted(kl: Tensor, soft_ce: Tensor, hard_ce: Tensor) -> WeightedLosses:
    return WeightedLosses(SOFT_WEIGHT * kl + HARD_WEIGHT * hard_ce, kl, soft_ce, hard_ce)


def definition(*rows: Tensor, **options: Any) -> WeightedLosses:
    return weighted(*reference.distillation_loss(*rows, **options))


def in_two_launches(*rows: Tensor, **options: Any) -> WeightedLosses:
    return weighted(*distillation_loss(*rows, **options))


def in_one_launch(*rows: Tensor, **options: Any) -> WeightedLosses:
    weights = {"soft_weight": SOFT_WEIGHT, "hard_weight": HARD_WEIGHT, "loss_scale": LOSS_SCALE}
    return weighted_distillation_loss(*rows, **weights, **options)


def by_pytorch(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> WeightedLosses:
    log_q = log_softmax(student / temperature, dim=-1)
    log_p = log_softmax(teacher / temperature, dim=-1)
    kl = kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    soft_ce = -(log_p.exp() * log_q).sum(-1).mean() * temperature**2
    return weighted(kl, soft_ce, cross_entropy(student, labels))


def parts_and_gradient(
    losses: Losses, student: Tensor, teacher: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    student = student.detach().requires_grad_()
    result = losses(student, teacher, labels, **options)
    gradient = torch.autograd.grad(LOSS_SCALE * result.loss, student)
    return *(part.detach() for part in result[1:]), *gradient


def relative_errors(values: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Return the relative errors of kl, soft_ce, hard_ce and, in norm, the gradient."""
    return [float((x.double() - true).norm() / true.norm()) for x, true in zip(values, exact, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", list(GRADIENT_ERROR), ids=str)
def test_losses_and_gradient_are_as_accurate_as_their_dtype(
    dtype: torch.dtype, temperature: float, device: str
) -> None:
    student, teacher, labels = random_rows(ROWS, dtype, device)

    def errors(losses: Losses) -> list[float]:
        values = parts_and_gradient(losses, student, teacher, labels, temperature=temperature)
        return relative_errors(values, exact)

    exact = parts_and_gradient(
        definition, student.double(), teacher.double(), labels, temperature=temperature
    )
    # bfloat16 has 8 significant bits: rounding an exact gradient gives an error of 2e-3.
    (rounding,) = relative_errors((exact[-1].to(dtype),), exact[-1:])
    *part_errors_of_pytorch, gradient_error_of_pytorch = errors(by_pytorch)
    for losses in (in_two_launches, in_one_launch):
        *part_errors, gradient_error = errors(losses)
        assert gradient_error <= max(GRADIENT_ERROR[dtype], 1.01 * rounding), losses
        assert gradient_error <= 2 * gradient_error_of_pytorch, losses
        for error, error_of_pytorch in zip(part_errors, part_errors_of_pytorch, strict=True):
            assert error <= LOSS_ERROR, losses
            assert error <= max(2 * error_of_pytorch, FLOAT32_STEP), losses


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("losses", [in_two_launches, in_one_launch])
def test_last_rows_of_more_than_2_to_the_31_logits(losses: Losses) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("a GPU with less than 24 GiB of memory")
    rows, last = 70_400, slice(-5, None)
    assert rows * VOCAB_SIZE > 2**31
    student, teacher = (torch.empty(rows, VOCAB_SIZE, dtype=torch.float16, device="cuda") for _ in range(2))
    labels = torch.full((rows,), -100, device="cuda")
    student[last], teacher[last], labels[last] = random_rows(5, torch.float16, "cuda")
    labels[-1] = VOCAB_SIZE - 1
    soft_mask = torch.arange(rows, device="cuda") >= rows - 5  # the others may hold anything

    values = parts_and_gradient(losses, student, teacher, labels, soft_mask=soft_mask)
    exact = parts_and_gradient(definition, student[last].double(), teacher[last].double(), labels[last])
    *part_errors, gradient_error = relative_errors((*values[:-1], values[-1][last]), exact)
    assert max(part_errors) <= 1e-5  # of so few rows; see ROWS
    assert gradient_error <= GRADIENT_ERROR[torch.float16]
    assert not values[-1][: last.start].any()
