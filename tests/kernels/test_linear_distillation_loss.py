"""The linear distillation loss against the losses and gradients of whole logits, and its other promises.

Both implementations for CPUs are tested, and on a GPU the Triton kernels. test_triton_kernels.py also runs it under
Triton's interpreter.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from cases import FLOAT32_ERROR, ROUNDING, SMALLEST_HALF_STEP, assert_parts_are_exact
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import (
    MANY_ROWS,
    TRAINED,
    Gradients,
    LinearCase,
    largest_logit,
    linear_cases,
    linear_loss,
    random_case,
    sizes_before_cancellation,
    weighted_sum,
    whole_loss,
)
from torch import Tensor

from distilspeed.kernels.implementation import linear_distillation_loss_ops as ops
from distilspeed.kernels.implementation.backend import INTERPRETED
from distilspeed.kernels.linear_distillation_loss import linear_distillation_loss

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_ROW, ALL_ROWS = 1, None  # chunk_bytes for the sizes of these tests


def relative_errors(gradients: Gradients, exact: Gradients) -> dict[str, float]:
    assert gradients.keys() == exact.keys()
    return {
        name: float((gradients[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact
    }


@pytest.fixture
def flushed_denormals() -> Iterator[None]:
    """Denormal numbers are 0, as in compilers' fast arithmetic."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def products_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that a test's few rows of a weight take several."""
    monkeypatch.setattr(ops, "PRODUCT_PART_BYTES", 1000)


@pytest.mark.usefixtures("products_in_parts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_are_those_of_the_definition(dtype: torch.dtype, device: str) -> None:
    @settings(max_examples=8 if INTERPRETED else 60, derandomize=True, database=None)
    @given(case=linear_cases(dtype, device), chunk_bytes=st.sampled_from([ONE_ROW, 1536, 10_000, ALL_ROWS]))
    def check(case: LinearCase, chunk_bytes: int | None) -> None:
        case, exact_case = case.in_dtype(dtype), case.in_dtype(torch.float64)
        result = linear_loss(case, chunk_bytes=chunk_bytes)
        gradients = case.gradients(result.loss)
        exact = whole_loss(exact_case)
        exact_gradients = exact_case.gradients(weighted_sum(exact))

        # The absolute error of a logit is the relative error of its exponential.
        lowest_temperature = min(1, case.temperature)
        softmax_error = 2 * ROUNDING[dtype] * largest_logit(exact_case) / lowest_temperature
        part_error = FLOAT32_ERROR + softmax_error / lowest_temperature
        assert_parts_are_exact(result, exact, case.temperature, part_error)
        torch.testing.assert_close(result.loss, weighted_sum(result))
        # Three more roundings: the logits' gradient, its product with hidden states or weight, and the scaled product.
        tolerance = FLOAT32_ERROR + softmax_error + 3 * ROUNDING[dtype]
        sizes = sizes_before_cancellation(case)
        for name, exact_gradient in exact_gradients.items():
            assert gradients[name].dtype == dtype
            error = (gradients[name].double() - exact_gradient).norm()
            smallest = SMALLEST_HALF_STEP[dtype] * math.sqrt(exact_gradient.numel())
            assert error <= tolerance * sizes[name] + smallest, name
        assert all(
            (gradients[name][case.vocab_size :] == 0).all() for name in gradients if name != TRAINED[0]
        )

    check()


@pytest.mark.parametrize("junk", [1e30, float("nan")])
def test_padding_of_the_teachers_vocabulary_does_not_matter(junk: float, device: str) -> None:
    case = random_case(7, width=37, device=device, vocab_size=37).in_dtype(torch.float32)
    weight, bias = case.projections.teacher_weight, case.projections.teacher_bias
    assert bias is not None
    wider = case.projections._replace(
        teacher_weight=torch.cat((weight, torch.full_like(weight[:5], junk))),
        teacher_bias=torch.cat((bias, torch.full_like(bias[:5], junk))),
    )
    expected, found = linear_loss(case), linear_loss(replace(case, projections=wider))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-6, atol=0)
    errors = relative_errors(case.gradients(found.loss), case.gradients(expected.loss))
    assert all(error <= 1e-6 for error in errors.values())


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
@pytest.mark.parametrize("labelled", [False, True])
def test_masked_out_rows_do_not_matter(junk: float, labelled: bool, device: str) -> None:
    """Attention over a row of padding alone gives NaN."""
    case = random_case(6, width=37, device=device).in_dtype(torch.float32)
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    labels = None
    if labelled:
        labels = torch.tensor([3, -100, -100, 7, -100, 1], device=device)
    gradients = []
    for value in (0.0, junk):
        parts = [None if part is None else part.detach().clone() for part in case.projections]
        for hidden in (parts[0], parts[3]):
            hidden[~mask] = value
        for part in parts[:3]:
            part.requires_grad_()
        linear_distillation_loss(
            parts[0],
            parts[1],
            parts[3],
            parts[4],
            labels,
            student_bias=parts[2],
            teacher_bias=parts[5],
            soft_mask=mask,
        ).loss.backward()
        gradients.append([part.grad for part in parts[:3]])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_float64_is_exact(device: str) -> None:
    soft_mask = torch.arange(7, device=device) < 5
    case = random_case(7, width=37, device=device, temperature=3.0, soft_mask=soft_mask, vocab_size=30)
    case = case.in_dtype(torch.float64)
    normalizers = {"soft_normalizer": 11, "hard_normalizer": 3}
    result, exact = linear_loss(case, chunk_bytes=2048, **normalizers), whole_loss(case, **normalizers)
    torch.testing.assert_close(result.loss, weighted_sum(exact), rtol=1e-12, atol=0)
    for part, exact_part in zip(result[1:], exact, strict=True):
        torch.testing.assert_close(part, exact_part.detach(), rtol=1e-12, atol=0)
    errors = relative_errors(case.gradients(result.loss), case.gradients(weighted_sum(exact)))
    assert all(error <= 1e-12 for error in errors.values())


@pytest.mark.parametrize("chunk_bytes", [2**15, ALL_ROWS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_errors_are_at_most_twice_those_of_pytorch(
    dtype: torch.dtype, chunk_bytes: int | None, device: str
) -> None:
    case = replace(random_case(MANY_ROWS, width=1000, device=device), gradient_scale=2.0**10).in_dtype(dtype)
    exact_case = case.in_dtype(torch.float64)
    exact = exact_case.gradients(weighted_sum(whole_loss(exact_case)))
    errors = relative_errors(case.gradients(linear_loss(case, chunk_bytes=chunk_bytes).loss), exact)
    errors_of_pytorch = relative_errors(case.gradients(weighted_sum(whole_loss(case))), exact)
    assert all(errors[name] <= 2 * errors_of_pytorch[name] for name in TRAINED), (errors, errors_of_pytorch)


@pytest.mark.parametrize(
    ("normalizer", "upstream", "weight_size"), [(4096 * 512, 2.0**16, 1), (1, 1.0, 15), (1, 2.0**-5, 15)]
)
def test_float16_gradients_neither_flush_nor_overflow(
    normalizer: int, upstream: float, weight_size: float, device: str
) -> None:
    case = random_case(6, width=1000, device=device)
    hidden, weight = case.projections.student_hidden, case.projections.student_weight
    projections = case.projections._replace(
        student_hidden=hidden / weight_size, student_weight=weight * weight_size
    )
    case = replace(case, projections=projections, gradient_scale=upstream).in_dtype(torch.float16)
    exact_case = case.in_dtype(torch.float64)
    normalizers = {"soft_normalizer": normalizer, "hard_normalizer": normalizer}
    exact = exact_case.gradients(weighted_sum(whole_loss(exact_case, **normalizers)))
    gradients = case.gradients(linear_loss(case, **normalizers).loss)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all()
        flushed = (gradient == 0) & (exact[name].abs() > 2**-24)
        assert flushed.double().mean() <= 1e-3, name  # a few: where terms cancel, rounded logits may give 0
    assert all(error <= 4 * 2**-11 for error in relative_errors(gradients, exact).values())


@pytest.mark.usefixtures("flushed_denormals")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_0_give_a_gradient_of_0(dtype: torch.dtype, device: str) -> None:
    case = random_case(6, width=40, device=device).in_dtype(dtype)
    result = linear_loss(case, soft_weight=0.0, hard_weight=0.0)
    assert result.loss == 0
    assert all((gradient == 0).all() for gradient in case.gradients(result.loss).values())


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_change_only_rounding_and_repetition_changes_nothing(dtype: torch.dtype, device: str) -> None:
    case = replace(random_case(MANY_ROWS, width=37, device=device), gradient_scale=2.0**8).in_dtype(dtype)
    first, again, in_chunks = (linear_loss(case, chunk_bytes=size) for size in (ALL_ROWS, ALL_ROWS, 2000))
    gradients = case.gradients(first.loss)
    for name, gradient in case.gradients(again.loss).items():
        assert torch.equal(gradient, gradients[name])
    assert torch.equal(torch.stack(first), torch.stack(again))
    # A product of fewer rows may round a logit differently to half precision.
    close = 1e-6 + ROUNDING[dtype] / 100
    torch.testing.assert_close(torch.stack(in_chunks), torch.stack(first), rtol=close, atol=0)
    errors = relative_errors(case.gradients(in_chunks.loss), gradients)
    assert all(error <= FLOAT32_ERROR + 2 * ROUNDING[dtype] for error in errors.values())


def test_leading_dimensions_are_rows(device: str) -> None:
    batch = random_case(3, 4, width=37, device=device).in_dtype(torch.float32)
    parts = batch.projections
    rows = parts._replace(
        student_hidden=parts.student_hidden.flatten(0, 1), teacher_hidden=parts.teacher_hidden.flatten(0, 1)
    )
    batch_result = linear_loss(batch)
    result = linear_loss(replace(batch, projections=rows, labels=batch.labels.flatten()))
    assert torch.equal(torch.stack(result), torch.stack(batch_result))
    gradients, batch_gradients = batch.gradients(result.loss), batch.gradients(batch_result.loss)
    assert all(torch.equal(gradients[name], batch_gradients[name]) for name in TRAINED)


def test_tied_weight_gets_both_its_gradients(device: str) -> None:
    case = random_case(6, width=37, device=device)
    tokens = torch.tensor([3, 0, 36, 3, 5, 1], device=device)

    def tied(dtype: torch.dtype) -> tuple[LinearCase, Tensor]:
        trained = case.in_dtype(dtype)
        weight = trained.projections.student_weight
        hidden = weight[tokens].tanh()
        return replace(trained, projections=trained.projections._replace(student_hidden=hidden)), weight

    (linear_case, weight), (exact_case, exact_weight) = tied(torch.float32), tied(torch.float64)
    linear_loss(linear_case).loss.backward()
    weighted_sum(whole_loss(exact_case)).backward()
    assert (weight.grad - exact_weight.grad).norm() <= FLOAT32_ERROR * exact_weight.grad.norm()


@pytest.mark.parametrize("count", [1, 2])
def test_frozen_tensors_get_no_gradient_and_do_not_change_others(count: int, device: str) -> None:
    case = random_case(6, width=37, device=device).in_dtype(torch.float32)
    gradients = case.gradients(linear_loss(case, chunk_bytes=2000).loss)
    for trained in combinations(TRAINED, count):
        partly_frozen = case.in_dtype(torch.float32, trained)
        some = partly_frozen.gradients(linear_loss(partly_frozen, chunk_bytes=2000).loss)
        assert some.keys() == set(trained)
        assert all(torch.equal(some[name], gradients[name]) for name in trained)


def test_frozen_student_gets_losses_without_a_graph(device: str) -> None:
    case = random_case(6, width=37, device=device).in_dtype(torch.float32)
    losses = linear_loss(case)
    assert [loss.requires_grad for loss in losses] == [True, False, False, False]
    frozen = linear_loss(case.in_dtype(torch.float32, trained=()))
    with torch.no_grad():
        evaluated = linear_loss(case)
    for without_graph in (frozen, evaluated):
        assert not any(loss.requires_grad for loss in without_graph)
        torch.testing.assert_close(
            torch.stack(without_graph), torch.stack(losses).detach(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("leading", [(0,), (3, 0), (6,)])
def test_no_soft_or_labelled_rows_give_a_loss_and_gradients_of_0(
    leading: tuple[int, ...], device: str
) -> None:
    case = random_case(*leading, width=37, device=device).in_dtype(torch.float32)
    soft_mask = torch.zeros(leading, dtype=torch.bool, device=device)
    result = linear_loss(replace(case, labels=torch.full(leading, -100, device=device), soft_mask=soft_mask))
    assert all(loss == 0 for loss in result)
    for name, gradient in case.gradients(result.loss).items():
        assert gradient.shape == getattr(case.projections, name).shape
        assert (gradient == 0).all()


def test_autocast_computes_in_half_precision_and_keeps_the_parameters_dtype(device: str) -> None:
    case = random_case(MANY_ROWS, width=37, device=device).in_dtype(torch.float32)
    half_case = case.in_dtype(torch.bfloat16)
    expected = linear_loss(half_case)
    with torch.autocast(device, torch.bfloat16):
        result = linear_loss(case)
    assert torch.equal(torch.stack(result), torch.stack(expected))
    gradients, expected_gradients = case.gradients(result.loss), half_case.gradients(expected.loss)
    assert all(gradients[name].dtype == torch.float32 for name in TRAINED)
    assert all(torch.equal(gradients[name], expected_gradients[name].float()) for name in TRAINED)


def test_autocast_leaves_float64_alone(device: str) -> None:
    case = random_case(6, width=37, device=device).in_dtype(torch.float64)
    with torch.autocast(device, torch.bfloat16):
        result = linear_loss(case)
    assert torch.equal(torch.stack(result), torch.stack(linear_loss(case)))
