"""The arguments that distillation_loss refuses, its behaviour in autograd, and its memory."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.distillation_loss import DistillationLoss, distillation_loss

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")

ROWS, VOCAB_SIZE = 6, 11
TRAINED = torch.tensor(2.0, requires_grad=True)


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, ROWS, VOCAB_SIZE, generator=generator, dtype=torch.float64).to(dtype)
    return student, teacher


def some_labels() -> Tensor:
    return torch.tensor([0, -100, 10, 3, -100, 3])


@pytest.mark.parametrize(
    ("teacher", "labels", "options", "message"),
    [
        (torch.zeros(ROWS, 12), None, {}, "teacher_logits must have the shape"),
        (torch.zeros(ROWS - 1, 12), None, {"vocab_size": 9}, "teacher_logits must have the shape"),
        (torch.zeros(1, ROWS, 12), None, {"vocab_size": 9}, "teacher_logits must have the shape"),
        (torch.zeros(ROWS, 10), None, {"vocab_size": 11}, "vocab_size must be from 1 to 10, not 11"),
        (torch.zeros(ROWS, 12), None, {"vocab_size": 12}, "vocab_size must be from 1 to 11, not 12"),
        (torch.zeros(ROWS, VOCAB_SIZE).half(), None, {}, "teacher_logits must have the dtype"),
        (torch.zeros(ROWS, VOCAB_SIZE, device="meta"), None, {}, "teacher_logits must be on the device"),
        (torch.zeros(ROWS, VOCAB_SIZE, requires_grad=True), None, {}, "teacher_logits must not require grad"),
        (None, torch.zeros(ROWS), {}, "labels must be torch.int64, not torch.float32"),
        (None, torch.zeros(ROWS, dtype=torch.int32), {}, "labels must be torch.int64, not torch.int32"),
        (None, torch.zeros(5, dtype=torch.int64), {}, "labels must have the shape"),
        (None, torch.zeros(ROWS, dtype=torch.int64, device="meta"), {}, "labels must be on cpu"),
        (None, torch.full((ROWS,), VOCAB_SIZE), {}, "labels must be from 0 to 10 or -100, not 11"),
        (None, torch.full((ROWS,), -1), {}, "labels must be from 0 to 10 or -100, not -1"),
        (None, torch.full((ROWS,), 9), {"vocab_size": 9}, "labels must be from 0 to 8 or -100, not 9"),
        (None, None, {"soft_mask": torch.ones(ROWS)}, "soft_mask must be torch.bool"),
        (None, None, {"soft_mask": torch.ones(2, 3, dtype=torch.bool)}, "soft_mask must have the shape"),
        (None, None, {"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        (None, None, {"temperature": -2.0}, "temperature must be positive"),
        (None, None, {"temperature": float("nan")}, "temperature must be positive"),
        (None, None, {"temperature": TRAINED}, "temperature must not require grad"),
        (None, None, {"soft_normalizer": TRAINED}, "soft_normalizer must not require grad"),
        (None, None, {"vocab_size": 0}, "vocab_size must be from 1 to 11, not 0"),
        (None, None, {"vocab_size": 12}, "vocab_size must be from 1 to 11, not 12"),
        (None, None, {"soft_normalizer": 0}, "soft_normalizer must be positive and finite, not 0"),
        (
            None,
            None,
            {"hard_normalizer": torch.ones(1)},
            "hard_normalizer must be a number or a 0-dim tensor",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    teacher: Tensor | None, labels: Tensor | None, options: dict[str, object], message: str
) -> None:
    student, matching_teacher = logits()
    with pytest.raises(ValueError, match=message) as failure:
        distillation_loss(student, matching_teacher if teacher is None else teacher, labels, **options)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("student", "message"),
    [(torch.tensor(1.0), "dimension"), (torch.ones(2, 3).long(), "float"), (torch.ones(2, 0), "column")],
)
def test_logits_must_be_floating_point_rows(student: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_loss(student, student)


def test_rows_that_overlap_get_the_gradient_of_a_copy() -> None:
    student, teacher = logits()
    windows = student.flatten()[: VOCAB_SIZE + 3].unfold(0, VOCAB_SIZE, 1).requires_grad_()  # strides (1, 1)
    copy = windows.detach().clone().requires_grad_()
    for rows in (windows, copy):
        distillation_loss(rows, teacher[: len(rows)]).kl.backward()
    assert torch.equal(windows.grad, copy.grad)


def test_numerical_gradient_agrees_in_float64() -> None:
    student, teacher = logits(torch.float64)
    soft_mask = torch.arange(ROWS) < 4

    def losses(student: Tensor) -> tuple[Tensor, ...]:
        return distillation_loss(
            student, teacher, some_labels(), temperature=3.0, soft_mask=soft_mask, hard_normalizer=2
        )

    assert torch.autograd.gradcheck(losses, student.requires_grad_())


def test_second_derivative_is_refused() -> None:
    student, teacher = logits()
    loss = distillation_loss(student.requires_grad_(), teacher).kl
    (gradient,) = torch.autograd.grad(loss.square(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_frozen_student_gets_losses_without_a_graph() -> None:
    losses = distillation_loss(*logits(), some_labels())
    assert not any(loss.requires_grad for loss in losses)


def test_without_labels_there_is_no_hard_loss() -> None:
    student, teacher = logits()
    losses = distillation_loss(student.requires_grad_(), teacher)
    assert losses.hard_ce == 0
    (gradient,) = torch.autograd.grad(losses.hard_ce, student)
    assert (gradient == 0).all()


def test_soft_losses_have_the_same_gradient() -> None:
    student, teacher = logits()
    losses = distillation_loss(student.requires_grad_(), teacher)
    by_kl, by_soft_ce = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses[:2])
    assert torch.equal(by_kl, by_soft_ce)


def test_one_row_of_logits_needs_no_batch_dimension() -> None:
    student, teacher = logits()
    one = distillation_loss(student[2], teacher[2], some_labels()[2])
    batch = distillation_loss(student[2:3], teacher[2:3], some_labels()[2:3])
    assert one == batch


def test_module_is_the_weighted_sum() -> None:
    student, teacher = logits()
    loss = DistillationLoss(temperature=4.0, soft_weight=3.0, hard_weight=0.5)
    options = {"soft_mask": torch.arange(len(student)) > 0, "soft_normalizer": 7.0, "hard_normalizer": 3.0}
    losses = distillation_loss(student, teacher, some_labels(), temperature=4.0, **options)
    expected = 3.0 * losses.kl + 0.5 * losses.hard_ce
    torch.testing.assert_close(loss(student, teacher, some_labels(), **options), expected)
    assert repr(loss) == "DistillationLoss(temperature=4.0, soft_weight=3.0, hard_weight=0.5)"


def test_gradient_does_not_overwrite_a_leaf() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match="leaf"):
        distillation_loss(student.requires_grad_(), teacher, inplace_backward=True)


def test_gradient_does_not_overwrite_a_view_of_a_leaf() -> None:
    parameter = torch.randn(ROWS * VOCAB_SIZE).requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        distillation_loss(parameter.view(ROWS, VOCAB_SIZE), logits()[1], inplace_backward=True)


def test_gradient_does_not_overwrite_rows_that_share_memory() -> None:
    student = torch.randn(1, VOCAB_SIZE).requires_grad_().expand(ROWS, VOCAB_SIZE)
    with pytest.raises(ValueError, match="share memory"):
        distillation_loss(student, logits()[1], inplace_backward=True)


PEAK_MEMORY = """
import resource, torch
from distilspeed.kernels.distillation_loss import distillation_loss

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def losses_and_gradient(rows, width=30522):
    hidden = torch.ones(rows, 1, requires_grad=True)
    student, teacher = hidden * torch.linspace(-4, 4, width), torch.empty(rows, width).uniform_(-4, 4)
    before = peak_mib()
    losses = distillation_loss(student, teacher, torch.arange(rows) % 7 - 1, ignore_index=-1, inplace_backward=INPLACE)
    (losses.kl + losses.hard_ce).backward()
    return peak_mib() - before

losses_and_gradient(16)
print(losses_and_gradient(256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize("inplace", [False, True])
def test_extra_memory_is_the_gradient_and_a_few_blocks(inplace: bool) -> None:
    script = PEAK_MEMORY.replace("INPLACE", str(inplace))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    logits_mib = 256 * 30522 * 4 / 2**20
    # 16 MiB for three or four blocks of 2 MiB and the allocator; one softmax would take 30.
    assert float(result.stdout) < (0 if inplace else logits_mib) + 16


def test_a_teacher_under_inference_mode_is_refused_only_if_it_must_be_saved() -> None:
    student, teacher = logits()
    with torch.inference_mode():
        inference = teacher * 1
    for student_needs_grad in (False, True):
        student = student.detach().requires_grad_(student_needs_grad)
        expected = distillation_loss(student, teacher).kl
        if not student_needs_grad:
            assert torch.equal(distillation_loss(student, inference).kl, expected)
            continue
        with pytest.raises(ValueError, match="teacher_logits come from"):
            distillation_loss(student, inference)
        with pytest.raises(ValueError, match="teacher_hidden come from"):
            cosine_loss(student, inference)
