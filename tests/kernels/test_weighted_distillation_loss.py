"""The weighted distillation loss against its definition, and its other promises.

Both implementations for CPUs are tested, and on a GPU the Triton kernels. test_triton_kernels.py also runs it under
Triton's interpreter.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    FLOAT32_ERROR,
    ROUNDING,
    SMALLEST_HALF_STEP,
    Case,
    assert_parts_are_exact,
    cases,
    random_logits,
    terms_of_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distilspeed.kernels import reference
from distilspeed.kernels.distillation_loss import distillation_loss
from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.backend import INTERPRETED
from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")

WEIGHTS = {"soft_weight": 1.5, "hard_weight": 2.0}


def weighted_sum(parts: Any) -> Tensor:
    return WEIGHTS["soft_weight"] * parts.kl + WEIGHTS["hard_weight"] * parts.hard_ce


def differentiate(loss: Tensor, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


def some_labels(rows: int, device: str) -> Tensor:
    labels = torch.arange(rows, device=device)
    return labels.where(labels % 3 > 0, -100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("several_tiles_and_blocks")
def test_loss_and_gradient_are_those_of_the_definition(dtype: torch.dtype, device: str) -> None:
    @settings(max_examples=15 if INTERPRETED else 100, derandomize=True, database=None)
    @given(
        case=cases(dtype, device),
        expected_share=st.sampled_from([1.0, 0.7, 2.0**-4]),  # loss scale / arriving gradient
        scale_as_tensor=st.booleans(),
    )
    def check(case: Case, expected_share: float, scale_as_tensor: bool) -> None:
        loss_scale: float | Tensor = expected_share * case.gradient_scale
        if scale_as_tensor:
            loss_scale = torch.tensor(loss_scale, device=device)
        student = case.student_logits.requires_grad_()
        exact_student = case.student_logits.detach().double().requires_grad_()
        result = weighted_distillation_loss(
            student, case.teacher_logits, case.labels, **WEIGHTS, **case.options(), loss_scale=loss_scale
        )
        gradient = differentiate(case.gradient_scale * result.loss, student)
        exact = reference.distillation_loss(
            exact_student, case.teacher_logits.double(), case.labels, **case.options()
        )
        exact_gradient = differentiate(case.gradient_scale * weighted_sum(exact), exact_student)

        assert_parts_are_exact(result, exact, case.temperature, FLOAT32_ERROR)
        torch.testing.assert_close(result.loss, weighted_sum(result), equal_nan=True)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        error = (gradient.double() - exact_gradient).norm()
        tolerance = FLOAT32_ERROR * terms_of_gradient(case, *WEIGHTS.values()).norm()
        # One rounding at the loss scale, and a second one if another gradient arrives.
        roundings, smallest_steps = (1, 1) if expected_share == 1 else (2, 1 + 1 / expected_share)
        tolerance += roundings * ROUNDING[dtype] * exact_gradient.norm()
        tolerance += smallest_steps * SMALLEST_HALF_STEP[dtype] * math.sqrt(gradient.numel())
        assert error <= tolerance
        assert (gradient[..., case.vocab_size :] == 0).all()

    check()


def test_parts_are_those_of_the_distillation_loss(device: str) -> None:
    student, teacher = random_logits(12, 300, dtype=torch.float32, device=device)
    options = {"soft_mask": torch.arange(12, device=device) % 4 > 0, "hard_normalizer": 5}
    parts = distillation_loss(student, teacher, some_labels(12, device), **options)
    result = weighted_distillation_loss(
        student.requires_grad_(), teacher, some_labels(12, device), **WEIGHTS, **options
    )
    torch.testing.assert_close(torch.stack(result[1:]), torch.stack(parts), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.loss.detach(), weighted_sum(parts), rtol=1e-6, atol=0)


def test_parts_carry_no_gradient(device: str) -> None:
    student, teacher = random_logits(3, 40, dtype=torch.float32, device=device)
    result = weighted_distillation_loss(student.requires_grad_(), teacher)
    assert [part.requires_grad for part in result] == [True, False, False, False]


def test_float16_is_refused_without_a_loss_scale(device: str) -> None:
    student, teacher = random_logits(2, 11, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="loss_scale must be given for float16"):
        weighted_distillation_loss(student, teacher)


@pytest.mark.parametrize("loss_scale", [2.0**16, 2.0**24])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_loss_scale_keeps_float16_gradients_from_flushing_to_zero(
    loss_scale: float, as_tensor: bool, device: str
) -> None:
    global_rows = 4096 * 512
    student, teacher = random_logits(2, 30522, dtype=torch.float16, device=device)
    exact_student = student.double().requires_grad_()
    result = weighted_distillation_loss(
        student.requires_grad_(),
        teacher,
        soft_normalizer=global_rows,
        **WEIGHTS,
        loss_scale=torch.tensor(loss_scale, device=device) if as_tensor else loss_scale,
    )
    exact = reference.distillation_loss(exact_student, teacher.double(), soft_normalizer=global_rows)
    gradient = differentiate(loss_scale * result.loss, student).double()
    exact_gradient = differentiate(loss_scale * weighted_sum(exact), exact_student)
    # An entry above half of float16's smallest number is representable.
    assert ((gradient == 0) <= (exact_gradient.abs() <= 2**-24)).all()
    rounding = 2**-11 * exact_gradient.norm() + 2**-25 * math.sqrt(gradient.numel())
    assert (gradient - exact_gradient).norm() <= 1.1 * rounding


@pytest.mark.memcheck
@pytest.mark.usefixtures("several_tiles_and_blocks")
@pytest.mark.parametrize("accumulation_steps", [41, 47, 97])
def test_accumulation_steps_whose_factor_is_almost_1_cause_no_second_rounding(
    accumulation_steps: int, device: str
) -> None:
    factor = (1 / torch.tensor(float(accumulation_steps), device=device)) * accumulation_steps
    gradient, _ = random_logits(4, 300, dtype=torch.float32, device=device)
    before = gradient.clone()
    assert torch.equal(ops.rescale_gradient(gradient, factor), before)


@pytest.mark.parametrize("factor", [1 + 2**-18, 1 - 2**-18, 0.5, math.inf, math.nan])
def test_every_other_factor_reaches_the_gradient(factor: float, device: str) -> None:
    gradient, _ = random_logits(4, 300, dtype=torch.float32, device=device)
    expected = gradient * factor
    rescaled = ops.rescale_gradient(gradient, torch.tensor(factor, device=device))
    torch.testing.assert_close(rescaled, expected, rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10])
def test_inplace_gives_the_same_gradient(loss_scale: float, device: str) -> None:
    student, teacher = random_logits(9, 40, dtype=torch.float32, device=device)
    labels = some_labels(9, device)
    options = {"soft_mask": torch.arange(9, device=device) % 2 == 0, "vocab_size": 37}
    student.requires_grad_()
    parts = distillation_loss(student, teacher, labels, **options)
    expected = differentiate(2.0**10 * weighted_sum(parts), student)
    logits = student * 1.0
    result = weighted_distillation_loss(
        logits, teacher, labels, **options, **WEIGHTS, loss_scale=loss_scale, inplace=True
    )
    # Powers of two, so that the bits do not depend on when the scale is applied.
    assert torch.equal(logits, expected * (loss_scale / 2.0**10))
    gradient = differentiate(2.0**10 * result.loss, student)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits, expected)


def test_second_backward_is_refused(device: str) -> None:
    student, teacher = random_logits(3, 40, dtype=torch.float32, device=device)
    loss = weighted_distillation_loss(student.requires_grad_(), teacher).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="use distillation_loss to call backward twice"):
        loss.backward()


def test_operation_that_saved_the_overwritten_logits_raises(device: str) -> None:
    student, teacher = random_logits(3, 40, dtype=torch.float32, device=device)
    saved_by_tanh = student.requires_grad_().tanh()
    loss = weighted_distillation_loss(saved_by_tanh, teacher, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_student_that_needs_no_gradient_keeps_its_logits(grad_enabled: bool, device: str) -> None:
    student, teacher = random_logits(6, 40, dtype=torch.float32, device=device)
    labels = some_labels(6, device)
    parts = distillation_loss(student, teacher, labels)
    # Frozen logits, or logits made with autograd on and evaluated with autograd off.
    logits = student.clone() if grad_enabled else student.clone().requires_grad_() * 1.0
    with torch.set_grad_enabled(grad_enabled):
        result = weighted_distillation_loss(logits, teacher, labels, **WEIGHTS, inplace=True)
    torch.testing.assert_close(result.loss, weighted_sum(parts), rtol=1e-6, atol=0)
    assert not any(part.requires_grad for part in result)
    assert torch.equal(logits, student)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (6, 5)])
def test_no_soft_or_labelled_rows_give_a_loss_and_a_gradient_of_zero(
    shape: tuple[int, ...], device: str
) -> None:
    student = torch.randn(shape, device=device).requires_grad_()
    labels = torch.full(shape[:-1], -100, device=device)
    soft_mask = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    result = weighted_distillation_loss(
        student, torch.randn(shape, device=device), labels, soft_mask=soft_mask
    )
    assert all(part == 0 for part in result)
    gradient = differentiate(result.loss, student)
    assert gradient.shape == shape
    assert (gradient == 0).all()


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_bits_every_time_and_under_autocast(dtype: torch.dtype, device: str) -> None:
    student, teacher = random_logits(12, 300, dtype=dtype, device=device)
    student.requires_grad_()

    def losses_and_gradients() -> tuple[Tensor, ...]:
        result = weighted_distillation_loss(student, teacher, some_labels(12, device), loss_scale=512.0)
        parts = distillation_loss(student, teacher, some_labels(12, device))
        gradients = (differentiate(512 * loss, student) for loss in (result.loss, weighted_sum(parts)))
        return torch.stack((*result, *parts)), *gradients

    runs = [losses_and_gradients(), losses_and_gradients()]
    with torch.autocast(device, torch.bfloat16):
        runs.append(losses_and_gradients())
    for run in runs[1:]:
        assert all(torch.equal(again, first) for again, first in zip(run, runs[0], strict=True))


def test_float64_is_exact(device: str) -> None:
    student, teacher = random_logits(6, 11, dtype=torch.float64, device=device)
    options = {"temperature": 3.0, "soft_mask": torch.arange(6, device=device) < 4, "hard_normalizer": 2}
    student.requires_grad_()
    result = weighted_distillation_loss(
        student, teacher, some_labels(6, device), **WEIGHTS, **options, loss_scale=7.0
    )
    exact = reference.distillation_loss(student, teacher, some_labels(6, device), **options)
    for loss, exact_loss in ((result.loss, weighted_sum(exact)), *zip(result[1:], exact, strict=True)):
        torch.testing.assert_close(loss.detach(), exact_loss.detach(), rtol=1e-12, atol=0)
    expected = differentiate(weighted_sum(exact), student)
    torch.testing.assert_close(differentiate(result.loss, student), expected, rtol=1e-12, atol=1e-15)


def of_distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return weighted_sum(distillation_loss(2 * student, teacher, labels, inplace_backward=True))


def of_weighted_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    result = weighted_distillation_loss(2 * student, teacher, labels, **WEIGHTS, loss_scale=4.0, inplace=True)
    return result.loss + 0 * result.kl


@pytest.mark.skipif(INTERPRETED, reason="the compiler sees the same operators without the interpreter")
@pytest.mark.parametrize("loss", [of_distillation_loss, of_weighted_loss])
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)]
)
def test_torch_compile_needs_no_graph_break(
    loss: Callable[..., Tensor], backend: str, dynamic: bool | None, device: str
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (7, 12):
        student, teacher = random_logits(rows, 24, dtype=torch.float32, device=device)
        arguments = (student.requires_grad_(), teacher, some_labels(rows, device))
        for upstream in (4.0, 12.0):  # the expected gradient, and another one
            total, eager_total = compiled(*arguments), loss(*arguments)
            torch.testing.assert_close(total, eager_total)
            expected = differentiate(upstream * eager_total, student)
            torch.testing.assert_close(differentiate(upstream * total, student), expected)


@pytest.mark.parametrize(("width", "teacher_width"), [(24, 24), (21, 21), (24, 21), (21, 24)])
def test_operators_pass_opcheck(width: int, teacher_width: int, device: str) -> None:
    student, teacher = random_logits(6, 24, dtype=torch.float16, device=device)
    student, teacher = student[:, :width], teacher[:, :teacher_width]
    settings = (student, teacher, some_labels(6, device), None, 2.0, -100, 20)
    table, coefficients = torch.ones(8, 6, device=device), torch.ones(2, device=device)
    torch.library.opcheck(ops.forward, settings)
    torch.library.opcheck(ops.backward, (*settings, table, coefficients))
    torch.library.opcheck(ops.forward_backward, (*settings, coefficients))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_scale": 0}, "loss_scale must be positive and finite, not 0"),
        ({"loss_scale": -1.0}, "loss_scale must be positive and finite"),
        ({"loss_scale": math.inf}, "loss_scale must be positive and finite"),
        ({"loss_scale": torch.ones(1)}, "loss_scale must be a number or a 0-dim tensor"),
        ({"loss_scale": torch.tensor(1.0, device="meta")}, "loss_scale must be a number or a 0-dim tensor"),
        (
            {"student_logits": torch.ones(3, 5).half(), "teacher_logits": torch.ones(3, 5).half()},
            "loss_scale must be given for float16",
        ),
        ({"soft_normalizer": 0}, "soft_normalizer must be positive and finite, not 0"),
        ({"hard_normalizer": torch.ones(1)}, "hard_normalizer must be a number or a 0-dim tensor"),
        ({"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        ({"vocab_size": 6}, "vocab_size must be from 1 to 5, not 6"),
        ({"hard_weight": torch.tensor(2.0, requires_grad=True)}, "hard_weight must not require grad"),
        ({"loss_scale": torch.tensor(2.0, requires_grad=True)}, "loss_scale must not require grad"),
        ({"soft_mask": torch.ones(3)}, "soft_mask must be torch.bool"),
        ({"labels": torch.ones(3)}, "labels must be torch.int64, not torch.float32"),
        ({"teacher_logits": torch.ones(3, 4)}, "teacher_logits must have the shape"),
        ({"teacher_logits": torch.ones(3, 5, requires_grad=True)}, "teacher_logits must not require grad"),
        ({"student_logits": torch.ones(3, 5, requires_grad=True), "inplace": True}, "leaf of the graph"),
        ({"student_logits": torch.ones(4, 5, requires_grad=True)[1:], "inplace": True}, "leaf of the graph"),
        ({"student_logits": torch.ones(1, 5).expand(3, 5), "inplace": True}, "rows share memory"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    arguments = {"student_logits": torch.zeros(3, 5), "teacher_logits": torch.zeros(3, 5)} | options
    with pytest.raises(ValueError, match=message) as failure:
        weighted_distillation_loss(**arguments)
    assert "\n" not in str(failure.value)
