"""The arguments that linear_distillation_loss refuses, its memory, and torch.compile without graph breaks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import TRAINED, LinearCase, linear_loss, random_case
from torch import Tensor

from distilspeed.kernels.implementation import linear_distillation_loss_ops as ops
from distilspeed.kernels.implementation.backend import use_triton
from distilspeed.kernels.linear_distillation_loss import LinearDistillationLoss, linear_distillation_loss
from distilspeed.kernels.profiling.measurement import peak_cpu_bytes, peak_cuda_bytes

ROWS, VOCAB_SIZE, HIDDEN, TEACHER_HIDDEN = 3, 5, 4, 6
ARGUMENTS = {
    "student_hidden": torch.zeros(ROWS, HIDDEN),
    "student_weight": torch.zeros(VOCAB_SIZE, HIDDEN),
    "teacher_hidden": torch.zeros(ROWS, TEACHER_HIDDEN),
    "teacher_weight": torch.zeros(VOCAB_SIZE, TEACHER_HIDDEN),
}
MIB = 2**20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"teacher_hidden": torch.zeros(ROWS, 6, requires_grad=True)},
            "teacher_hidden must not require grad",
        ),
        ({"teacher_weight": torch.zeros(5, 6, requires_grad=True)}, "teacher_weight must not require grad"),
        ({"teacher_bias": torch.zeros(5, requires_grad=True)}, "teacher_bias must not require grad"),
        ({"student_hidden": torch.tensor(1.0)}, "student_hidden must have at least one dimension"),
        ({"student_hidden": torch.zeros(ROWS, HIDDEN).long()}, "student_hidden must be a floating-point"),
        ({"student_weight": torch.zeros(5, 7)}, r"student_weight must have the shape \[5, 4\], not \[5, 7\]"),
        ({"student_weight": torch.zeros(4)}, "student_weight must have the shape"),
        (
            {"student_weight": torch.zeros(5, 4).half()},
            "student_weight must have the dtype of student_hidden",
        ),
        ({"student_weight": torch.zeros(5, 4, device="meta")}, "student_weight must be on the device"),
        ({"student_bias": torch.zeros(6)}, r"student_bias must have the shape \[5\], not \[6\]"),
        ({"student_bias": torch.zeros(5).double()}, "student_bias must have the dtype"),
        ({"teacher_hidden": torch.zeros(2, 6)}, r"teacher_hidden must have the shape \[3, 6\], not \[2, 6\]"),
        ({"teacher_hidden": torch.zeros(ROWS, 6).half()}, "teacher_hidden must have the dtype"),
        ({"teacher_weight": torch.zeros(4, 6)}, r"teacher_weight must have the shape \[5, 6\], not \[4, 6\]"),
        (
            {"teacher_weight": torch.zeros(4, 6), "vocab_size": 5},
            "vocab_size must be from 1 to 4, not 5",
        ),
        (
            {"teacher_weight": torch.zeros(7, 6), "teacher_bias": torch.zeros(5), "vocab_size": 5},
            r"teacher_bias must have the shape \[7\], not \[5\]",
        ),
        ({"teacher_weight": torch.zeros(5, 6, device="meta")}, "teacher_weight must be on the device"),
        ({"teacher_bias": torch.zeros(4)}, "teacher_bias must have the shape"),
        ({"labels": torch.zeros(ROWS)}, "labels must be torch.int64, not torch.float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels must have the shape"),
        ({"soft_mask": torch.ones(ROWS)}, "soft_mask must be torch.bool"),
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"vocab_size": 6}, "vocab_size must be from 1 to 5, not 6"),
        ({"soft_normalizer": 0}, "soft_normalizer must be positive and finite"),
        ({"hard_normalizer": torch.tensor(2.0, requires_grad=True)}, "hard_normalizer must not require grad"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, "temperature must not require grad"),
        ({"soft_weight": torch.tensor(2.0, requires_grad=True)}, "soft_weight must not require grad"),
        ({"hard_normalizer": torch.ones(1)}, "hard_normalizer must be a number or a 0-dim tensor"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as failure:
        linear_distillation_loss(**ARGUMENTS | arguments)
    assert "\n" not in str(failure.value)


def test_autocast_refuses_integer_hidden_states() -> None:
    arguments = ARGUMENTS | {"student_hidden": torch.zeros(ROWS, HIDDEN).long()}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="floating-point"):
        linear_distillation_loss(**arguments)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_sums_over_rows_may_exceed_the_range_of_float16(is_autocast: bool, device: str) -> None:
    # Every row moves the same class in the same direction, along a large hidden dimension.
    hidden = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    hidden[:, 0] = 10
    dtype = torch.float32 if is_autocast else torch.float16
    hidden = hidden.to(device, dtype)
    weight = torch.zeros(3000, 64, dtype=dtype, device=device)
    bias = weight.new_zeros(3000)
    bias[7] = 12
    student_weight = weight.clone().requires_grad_()
    with torch.autocast(torch.device(device).type, torch.float16, enabled=is_autocast):
        loss = linear_distillation_loss(hidden, student_weight, hidden, weight, teacher_bias=bias).loss
    loss.backward()
    assert student_weight.grad is not None
    assert student_weight.grad.isfinite().all()
    assert (student_weight.grad[7, 0] < -5).all()


@pytest.mark.parametrize("label", [-1, 4])
def test_label_outside_the_vocabulary_is_refused_on_a_cpu(label: int) -> None:
    labels = torch.full((ROWS,), label)
    if use_triton(ARGUMENTS["student_hidden"]):
        pytest.skip("the Triton implementation does not check labels, because that would synchronise")
    with pytest.raises(ValueError, match=f"labels must be from 0 to 3 or -100, not {label}"):
        linear_distillation_loss(**ARGUMENTS, labels=labels, vocab_size=4)


def test_module_is_the_loss(device: str) -> None:
    case = random_case(6, width=37, device=device)
    weights = {"soft_weight": 3.0, "hard_weight": 0.5}
    options = {
        "soft_mask": torch.arange(6, device=device) > 0,
        "soft_normalizer": 7.0,
        "hard_normalizer": 3.0,
    }
    loss = LinearDistillationLoss(temperature=4.0, **weights)
    expected = linear_loss(case, temperature=4.0, **weights, **options).loss
    assert loss(**case.projections._asdict(), labels=case.labels, **options) == expected
    assert repr(loss) == "LinearDistillationLoss(temperature=4.0, soft_weight=3.0, hard_weight=0.5)"


def test_second_backward_is_refused(device: str) -> None:
    loss = linear_loss(random_case(6, width=37, device=device).in_dtype(torch.float32)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward has used its gradients"):
        loss.backward()


def test_second_derivative_is_refused(device: str) -> None:
    case = random_case(6, width=37, device=device).in_dtype(torch.float32)
    loss = linear_loss(case).loss
    (gradient,) = torch.autograd.grad(loss.square(), case.projections.student_hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    run()  # the matrix-product library keeps its workspace
    return peak_cpu_bytes(run) if device == "cpu" else peak_cuda_bytes(run, torch.device(device))


def test_logits_are_never_stored_whole(device: str) -> None:
    rows, vocab_size, hidden, chunk_bytes = 512, 8000, 64, 4 * MIB
    case = random_case(rows, width=vocab_size, device=device, student_size=hidden).in_dtype(torch.float32)

    def run() -> object:
        return case.gradients(linear_loss(case, chunk_bytes=chunk_bytes).loss)

    gradients = 4 * (rows * hidden + vocab_size * hidden + vocab_size)
    # 12 MiB for a CPU's work blocks and small allocations; one matrix of logits takes 16.
    assert peak_bytes(run, device) <= chunk_bytes + gradients + 12 * MIB


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_frozen_weight_and_evaluation_allocate_no_gradient(grad_enabled: bool, device: str) -> None:
    vocab_size, hidden, chunk_bytes = 8000, 512, MIB
    trained = ("student_hidden",) if grad_enabled else TRAINED
    case = random_case(32, width=vocab_size, device=device, student_size=hidden)
    case = case.in_dtype(torch.float32, trained)

    def run() -> object:
        with torch.set_grad_enabled(grad_enabled):
            return linear_loss(case, chunk_bytes=chunk_bytes)

    # 12 MiB for a CPU's work blocks and small allocations; the weight's gradient takes 16.
    assert peak_bytes(run, device) <= chunk_bytes + 12 * MIB


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("width", [64, 100])
def test_products_have_whole_rows_on_gpus_of_a_multiple_of_64(
    width: int, on_gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(32, width=width, device=device).in_dtype(torch.float32)
    logits: list[tuple[int, int]] = []
    project = ops.project

    def recorded(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        project(hidden, weight, bias, out)
        assert out.is_contiguous()
        assert bias is not None
        assert len(weight) == len(bias) == out.shape[1]
        logits.append(tuple(out.shape))

    def added(total: Tensor, left: Tensor, right: Tensor) -> None:
        assert left.T.is_contiguous()
        assert total.is_contiguous()
        add_product(total, left, right)

    add_product = ops.add_product
    monkeypatch.setattr(ops, "project", recorded)
    monkeypatch.setattr(ops, "add_product", added)
    logits_width, fake_device = ops.logits_width, torch.device("cuda" if on_gpu else "cpu")
    monkeypatch.setattr(ops, "logits_width", lambda width, _: logits_width(width, fake_device))
    linear_loss(case, chunk_bytes=2 * 16 * 128 * 4)
    columns = -(-width // 64) * 64 if on_gpu else width
    assert logits == [(chunk, columns) for chunk in ([32] if width == 64 else [16, 16]) for _ in range(2)]


def loss_of_leaves(case: LinearCase) -> Callable[..., Tensor]:
    def loss(*trained: Tensor) -> Tensor:
        hidden, weight, bias = trained
        parts = case.projections._replace(student_hidden=2 * hidden, student_weight=weight, student_bias=bias)
        result = linear_distillation_loss(**parts._asdict(), labels=case.labels, soft_normalizer=9)
        return result.loss + 0 * result.kl

    return loss


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_torch_compile_needs_no_graph_break(
    dtype: torch.dtype, backend: str, dynamic: bool | None, device: str
) -> None:
    torch.compiler.reset()
    for rows in (7, 12):
        case = random_case(rows, width=37, device=device).in_dtype(dtype)
        loss = loss_of_leaves(case)
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
        trained = case.projections[:3]
        total, eager_total = compiled(*trained), loss(*trained)
        torch.testing.assert_close(total, eager_total)
        gradients, expected = (torch.autograd.grad(8 * x, trained) for x in (total, eager_total))
        for gradient, expected_gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("needs_gradient", [[True, True, True], [False, True, False], [False, False, False]])
def test_operator_passes_opcheck(needs_gradient: list[bool], device: str) -> None:
    case = random_case(6, width=37, device=device).in_dtype(torch.float16, trained=())
    settings = (case.labels, None, 2.0, -100, 30, torch.ones(2, device=device), 2000)
    torch.library.opcheck(ops.forward_backward, (*case.projections, *settings, needs_gradient))
