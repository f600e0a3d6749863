"""The cosine loss against its float64 definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distilspeed.kernels import reference
from distilspeed.kernels.cosine_loss import cosine_loss

# Half the distance between neighbouring numbers, relative; see test_distillation_loss.py.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def hidden_states(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(
        2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return student, teacher


def test_definition_is_that_of_pytorch() -> None:
    student, teacher = hidden_states(3, 4, 8)
    expected = (1 - cosine_similarity(student, teacher, dim=-1)).mean()
    torch.testing.assert_close(reference.cosine_loss(student, teacher), expected)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_loss_and_gradient_are_those_of_the_definition(dtype: torch.dtype, device: str) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.sampled_from([(1, 3), (5, 64), (2, 3, 768)]),
        size=st.sampled_from([1e-2, 1.0, 30.0]),
        masked=st.sampled_from([None, 0.0, 0.5, 1.0]),
        similar=st.booleans(),
        transposed=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def check(
        shape: tuple[int, ...], size: float, masked: float | None, similar: bool, transposed: bool, seed: int
    ) -> None:
        student, teacher = hidden_states(*shape, seed=seed)
        if similar:
            student = teacher + 0.01 * student
        if transposed:
            student = student.transpose(0, -1).contiguous().transpose(0, -1)
        student, teacher = (size * student).to(device, dtype), teacher.to(device, dtype)
        mask = None if masked is None else torch.rand(shape[:-1], device=device) < masked
        exact_student = student.double().requires_grad_()
        loss = cosine_loss(student.requires_grad_(), teacher, mask=mask)
        exact = reference.cosine_loss(exact_student, teacher.double(), mask=mask)
        assert loss.dtype == torch.float32
        # 1 - cos of two vectors that point the same way keeps float32's absolute error, not its relative one.
        assert abs(loss.double() - exact) <= 1e-6

        # A loss scale that puts the gradient into the middle of float16's range.
        scale = 64.0 * size
        (gradient,) = torch.autograd.grad(scale * loss, student)
        (exact_gradient,) = torch.autograd.grad(scale * exact, exact_student)
        # The gradient is the difference of two vectors of length scale / (rows * norm).
        rows = student[..., 0].numel() if mask is None else max(1, int(mask.sum()))
        counted = student if mask is None else student[mask]
        terms = 2 * scale / rows * counted.detach().double().norm(dim=-1).pow(-1).norm()
        smallest = 2**-25 * student.numel() ** 0.5 if dtype == torch.float16 else 0.0
        error = (gradient.double() - exact_gradient).norm()
        assert error <= 1e-6 * terms + ROUNDING[dtype] * exact_gradient.norm() + smallest

    check()


def test_numerical_gradient_agrees_in_float64() -> None:
    student, teacher = hidden_states(3, 4, 5)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda states: cosine_loss(states, teacher, mask=mask, normalizer=7), student
    )


def test_zero_vectors_have_cosine_zero_and_no_nan(device: str) -> None:
    student, teacher = (states.float().to(device) for states in hidden_states(3, 6))
    student[0] = 0
    teacher[1] = 0
    student[2], teacher[2] = 0, 0
    exact_student = student.double().requires_grad_()
    loss = cosine_loss(student.requires_grad_(), teacher)
    exact = reference.cosine_loss(exact_student, teacher.double())
    assert loss == 1
    (gradient,) = torch.autograd.grad(loss, student)
    (exact_gradient,) = torch.autograd.grad(exact, exact_student)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=0)


def test_masked_rows_count_for_nothing_whatever_they_hold(device: str) -> None:
    student, teacher = (states.half().to(device) for states in hidden_states(4, 6))
    student[1], teacher[2] = torch.nan, torch.inf
    mask = torch.tensor([True, False, False, True], device=device)
    loss = cosine_loss(student.requires_grad_(), teacher, mask=mask)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, cosine_loss(student.detach()[mask], teacher[mask]))
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()


def test_normalizer_of_a_global_batch_makes_the_split_irrelevant(device: str) -> None:
    student, teacher = (states.float().to(device) for states in hidden_states(9, 16))
    normalizer = torch.tensor(9, device=device)
    parts = [cosine_loss(student[r], teacher[r], normalizer=normalizer) for r in (slice(0, 2), slice(2, 9))]
    torch.testing.assert_close(sum(parts), cosine_loss(student, teacher))


def test_loss_scale_is_applied_before_the_gradient_is_rounded(device: str) -> None:
    student, teacher = (states.half().to(device) for states in hidden_states(2, 768))
    loss = cosine_loss(student.requires_grad_(), teacher, normalizer=4096 * 512)
    (gradient,) = torch.autograd.grad(2.0**24 * loss, student)
    assert (gradient != 0).double().mean() > 0.99


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 5)])
def test_nothing_to_learn_from_is_a_loss_and_a_gradient_of_zero(shape: tuple[int, ...], device: str) -> None:
    student = torch.randn(shape, device=device).requires_grad_()
    mask = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    loss = cosine_loss(student, torch.randn(shape, device=device), mask=mask)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0
    assert gradient.shape == shape
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (torch.zeros(2, 4), {}, "teacher_hidden must have the shape"),
        (torch.zeros(2, 3).half(), {}, "teacher_hidden must have the dtype"),
        (torch.zeros(2, 3, requires_grad=True), {}, "teacher_hidden must not require grad"),
        (torch.zeros(2, 3), {"mask": torch.ones(2)}, "mask must be torch.bool"),
        (torch.zeros(2, 3), {"mask": torch.ones(3, dtype=torch.bool)}, "mask must have the shape"),
        (torch.zeros(2, 3), {"normalizer": -1}, "normalizer must be positive"),
    ],
)
def test_wrong_arguments_are_refused(teacher: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_loss(torch.zeros(2, 3), teacher, **options)
