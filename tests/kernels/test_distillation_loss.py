"""The promises of the distillation loss that every implementation keeps.

Both implementations for CPUs are tested, and on a GPU the Triton kernels. test_triton_kernels.py also runs it under
Triton's interpreter.
"""

import math
import os

import pytest
import torch
from torch import Tensor

from distilspeed.kernels import reference
from distilspeed.kernels.distillation_loss import DistillationLosses, distillation_loss
from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.backend import use_triton
from distilspeed.kernels.implementation.distillation_loss_rows import LossRows, RowTable

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")


def random_logits(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = 2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, dtype)


def weighted_sum(losses: DistillationLosses) -> Tensor:
    return 1.5 * losses.kl + 0.5 * losses.soft_ce + 2.0 * losses.hard_ce


def gradient_of(losses: DistillationLosses, student_logits: Tensor, loss_scale: float = 1.0) -> Tensor:
    (gradient,) = torch.autograd.grad(loss_scale * weighted_sum(losses), student_logits)
    return gradient


@pytest.mark.memcheck
@pytest.mark.parametrize(("padding", "teacher_padding"), [(0, 0), (6, 6), (0, 70), (70, 6)])
def test_vocabulary_of_bert_in_the_tiles_and_blocks_of_production(
    padding: int, teacher_padding: int, device: str
) -> None:
    vocab_size, temperature = 30522, 2.0
    student, teacher = random_logits(10, vocab_size + 70, dtype=torch.float32, device=device)
    student, teacher = student[:, : vocab_size + padding], teacher[:, : vocab_size + teacher_padding]
    labels = torch.tensor([0, vocab_size - 1, -100, -100, 4095, 4096, -100, -100, -100, 7], device=device)
    options = {"temperature": temperature, "vocab_size": vocab_size}

    exact_student = student.double().requires_grad_()
    exact = reference.distillation_loss(exact_student, teacher.double(), labels, **options)
    losses = distillation_loss(student.requires_grad_(), teacher, labels, **options)
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(exact), rtol=1e-6, atol=0)
    exact_gradient = gradient_of(exact, exact_student)
    error = (gradient_of(losses, student).double() - exact_gradient).norm()
    assert error <= 1e-6 * exact_gradient.norm()


def test_with_global_normalizers_the_split_of_a_batch_does_not_matter(device: str) -> None:
    student, teacher = random_logits(12, 33, dtype=torch.float32, device=device)
    labels = torch.tensor([3, -100, 5, -100, -100, -100, 0, 1, 2, 3, -100, 32], device=device)
    soft_mask = torch.arange(12, device=device) % 3 > 0
    student.requires_grad_()
    whole = distillation_loss(student, teacher, labels, soft_mask=soft_mask)
    whole_gradient = gradient_of(whole, student)
    parts, gradient = torch.zeros(3, device=device), torch.zeros_like(student)
    for rows in (slice(0, 5), slice(5, 12)):
        part = distillation_loss(
            student[rows],
            teacher[rows],
            labels[rows],
            soft_mask=soft_mask[rows],
            soft_normalizer=soft_mask.sum(),
            hard_normalizer=7,
        )
        parts += torch.stack(part)
        gradient += gradient_of(part, student)
    torch.testing.assert_close(parts, torch.stack(whole))
    torch.testing.assert_close(gradient, whole_gradient)


@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**24])
def test_loss_scale_keeps_float16_gradients_from_flushing_to_zero(loss_scale: float, device: str) -> None:
    vocab_size, global_rows = 30522, 4096 * 512
    student, teacher = random_logits(2, vocab_size, dtype=torch.float16, device=device)
    exact_student = student.double().requires_grad_()
    losses = distillation_loss(student.requires_grad_(), teacher, soft_normalizer=global_rows)
    exact = reference.distillation_loss(exact_student, teacher.double(), soft_normalizer=global_rows)
    gradient = gradient_of(losses, student, loss_scale).double()
    exact_gradient = gradient_of(exact, exact_student, loss_scale)
    # An entry above half of float16's smallest number is representable. One rounding has a relative error of 2^-11 for
    # normal numbers, and an absolute error of 2^-25 for subnormal ones.
    assert ((gradient == 0) <= (exact_gradient.abs() <= 2**-24)).all()
    rounding = 2**-11 * exact_gradient.norm() + 2**-25 * math.sqrt(gradient.numel())
    assert (gradient - exact_gradient).norm() <= 1.1 * rounding
    unscaled = exact_gradient.div(loss_scale).half()
    assert (unscaled == 0).double().mean() > 0.9, (
        "the case is too easy: nothing would flush without the scale"
    )


@pytest.mark.usefixtures("several_tiles_and_blocks")
@pytest.mark.parametrize("size", [1e5, 1e8, 1e12, 1e30])
def test_huge_logits(size: float, device: str) -> None:
    student, teacher = (size * z for z in random_logits(6, 50, dtype=torch.float32, device=device))
    labels = torch.tensor([3, -100, 49, -100, 0, 20], device=device)
    exact_student = student.double().requires_grad_()
    exact = reference.distillation_loss(exact_student, teacher.double(), labels, temperature=3.0)
    losses = distillation_loss(student.requires_grad_(), teacher, labels, temperature=3.0)
    torch.testing.assert_close(torch.stack(losses).double(), torch.stack(exact), rtol=1e-6, atol=0)
    exact_gradient = gradient_of(exact, exact_student)
    error = (gradient_of(losses, student).double() - exact_gradient).norm()
    assert error <= 1e-6 * exact_gradient.norm()


def test_rows_that_are_neither_soft_nor_labelled_are_not_read(device: str) -> None:
    student, teacher = (torch.full((4, 20), math.nan, device=device) for _ in range(2))
    student[1], teacher[1], student[2] = 0, 1, 2
    soft_mask = torch.tensor([False, True, False, False], device=device)
    labels = torch.tensor([-100, -100, 5, -100], device=device)
    losses = distillation_loss(student.requires_grad_(), teacher, labels, soft_mask=soft_mask)
    gradient = gradient_of(losses, student)
    torch.testing.assert_close(losses.hard_ce, torch.tensor(math.log(20), device=device))
    assert all(loss.isfinite() for loss in losses)
    assert gradient.isfinite().all()
    assert (gradient[[0, 3]] == 0).all()
    assert (gradient[2] != 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (6, 5)])
def test_no_soft_or_labelled_rows_give_a_loss_and_a_gradient_of_zero(
    shape: tuple[int, ...], device: str
) -> None:
    student = torch.randn(shape, device=device).requires_grad_()
    labels = torch.full(shape[:-1], -100, device=device)
    soft_mask = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    losses = distillation_loss(student, torch.randn(shape, device=device), labels, soft_mask=soft_mask)
    assert all(loss == 0 for loss in losses)
    gradient = gradient_of(losses, student)
    assert gradient.shape == shape
    assert (gradient == 0).all()


@pytest.mark.memcheck
@pytest.mark.usefixtures("several_tiles_and_blocks")
@pytest.mark.parametrize("labelled", [False, True])
def test_inplace_backward_gives_the_same_gradient(labelled: bool, device: str) -> None:
    student, teacher = random_logits(9, 40, dtype=torch.float32, device=device)
    labels = torch.tensor([1, -100, 2, 3, -100, -100, 5, 6, 36], device=device) if labelled else None
    options = {"soft_mask": torch.arange(9, device=device) % 2 == 0, "vocab_size": 37}
    student.requires_grad_()
    expected = gradient_of(distillation_loss(student, teacher, labels, **options), student)
    logits = student * 1.0
    total = weighted_sum(distillation_loss(logits, teacher, labels, **options, inplace_backward=True))
    (gradient,) = torch.autograd.grad(total, student, retain_graph=True)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits, expected)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


def test_operation_that_saved_the_overwritten_logits_raises(device: str) -> None:
    student, teacher = random_logits(3, 40, dtype=torch.float32, device=device)
    saved_by_tanh = student.requires_grad_().tanh()
    loss = distillation_loss(saved_by_tanh, teacher, inplace_backward=True).kl
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.memcheck
def test_same_bits_every_time(device: str) -> None:
    student, teacher = random_logits(12, 300, dtype=torch.float16, device=device)
    labels = torch.arange(12, device=device)
    student.requires_grad_()
    runs = [distillation_loss(student, teacher, labels) for _ in range(2)]
    assert torch.equal(torch.stack(runs[0]), torch.stack(runs[1]))
    assert torch.equal(*(gradient_of(losses, student, 1024.0) for losses in runs))


def test_label_outside_the_vocabulary_gives_nan_on_a_gpu(device: str) -> None:
    logits = torch.randn(3, 20, device=device)
    if not use_triton(logits):
        pytest.skip("the chunked implementation refuses such labels; see test_distillation_loss_contract.py")
    labels = torch.tensor([19, 3, -100], device=device)
    rows = LossRows(logits, logits, labels, None, 2.0, ignore_index=-100, vocab_size=18)
    table = ops.implementation_for(logits).forward(rows)
    assert RowTable(*table).hard_ce.isnan().tolist() == [True, False, False]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1")
def test_triton_runs_under_the_interpreter() -> None:
    assert ops.implementation_for(torch.zeros(1)) is ops.distillation_loss_triton
