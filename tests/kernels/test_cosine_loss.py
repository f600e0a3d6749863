"""The cosine loss against its float64 definition, and its other promises.

Both implementations for CPUs are tested, and on a GPU the Triton kernels. test_cosine_loss_triton.py also runs it under
Triton's interpreter.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distilspeed.kernels import cosine_loss as public
from distilspeed.kernels import reference
from distilspeed.kernels.cosine_loss import CosineLoss, cosine_loss
from distilspeed.kernels.implementation import cosine_loss_chunked
from distilspeed.kernels.implementation.backend import INTERPRETED, TRITON_INSTALLED

pytestmark = pytest.mark.usefixtures("every_cpu_implementation")

# Half the relative distance between neighbouring numbers. The interpreter truncates to bfloat16 instead of rounding.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}


@pytest.fixture
def small_tiles_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks so small that a test's few rows take several of each."""
    monkeypatch.setattr(cosine_loss_chunked, "BLOCK_BYTES", 700)
    if TRITON_INSTALLED:
        from distilspeed.kernels.implementation import cosine_loss_triton

        small = cosine_loss_triton.LaunchConfig(tile=16, num_warps=1)
        monkeypatch.setattr(cosine_loss_triton, "cosine_launch_config", lambda hidden: small)


def hidden_states(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(
        2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return student, teacher


def random_mask(*shape: int, share: float = 0.6, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def differentiate(loss: Tensor, student: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


def assert_agrees_with_definition(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, scale: float = 1.0
) -> None:
    """``scale`` is the loss scale; it should keep the gradient within the range of the student's dtype."""
    exact_student = student.double().requires_grad_()
    loss = cosine_loss(student.requires_grad_(), teacher, mask=mask)
    exact = reference.cosine_loss(exact_student, teacher.double(), mask=mask)
    assert loss.dtype == torch.float32
    # 1 - cos of two similar vectors has float32's absolute error, not its relative error.
    assert abs(loss.double() - exact) <= 1e-6

    gradient = differentiate(scale * loss, student)
    exact_gradient = differentiate(scale * exact, exact_student)
    assert gradient.dtype == student.dtype
    # The gradient is the difference of two vectors of length scale / (rows * norm).
    rows = student[..., 0].numel() if mask is None else max(1, int(mask.sum()))
    counted = student if mask is None else student[mask]
    terms = 2 * scale / rows * counted.detach().double().norm(dim=-1).pow(-1).norm()
    smallest = 2**-25 * student.numel() ** 0.5 if student.dtype == torch.float16 else 0.0
    error = (gradient.double() - exact_gradient).norm()
    assert error <= 1e-6 * terms + ROUNDING[student.dtype] * exact_gradient.norm() + smallest


def test_definition_is_that_of_pytorch() -> None:
    student, teacher = hidden_states(3, 4, 8)
    expected = (1 - cosine_similarity(student, teacher, dim=-1)).mean()
    torch.testing.assert_close(reference.cosine_loss(student, teacher), expected)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_loss_and_gradient_are_those_of_the_definition(dtype: torch.dtype, device: str) -> None:
    @settings(max_examples=25 if INTERPRETED else 60, derandomize=True, database=None)
    @given(
        # Few distinct sizes: on a GPU each needs a compilation.
        shape=st.sampled_from([(3,), (7, 5), (2, 3, 768), (3, 1024)]),
        size=st.sampled_from([1e-2, 1.0, 1e4]),
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
        mask = None if masked is None else random_mask(*shape[:-1], share=masked, seed=seed).to(device)
        assert_agrees_with_definition(student, teacher, mask, scale=64.0 * size)

    check()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.usefixtures("small_tiles_and_blocks")
def test_rows_of_several_tiles_and_batches_of_several_blocks(dtype: torch.dtype, device: str) -> None:
    student, teacher = (states.to(device, dtype) for states in hidden_states(11, 37))
    assert_agrees_with_definition(student, teacher, scale=64.0)
    assert_agrees_with_definition(student, teacher, random_mask(11).to(device), scale=64.0)


@pytest.mark.parametrize(
    ("dtype", "hidden", "size"),
    [(torch.float16, 4096, 65504.0), (torch.bfloat16, 16, 1e17), (torch.float32, 16, 1e17)],
    ids=str,
)
def test_largest_hidden_states_do_not_overflow(
    dtype: torch.dtype, hidden: int, size: float, device: str
) -> None:
    student, teacher = (size * states.sign() for states in hidden_states(2, hidden))
    student[..., 1:] = student[..., 1:].where(random_mask(hidden - 1), teacher[..., 1:])
    assert_agrees_with_definition(student.to(device, dtype), teacher.to(device, dtype), scale=64.0 * size)


def test_row_offsets_beyond_32_bits(device: str) -> None:
    row_stride, hidden = 2**31 // 3 + 1, 8
    # 4 GiB of addresses; a CPU allocates only the pages that are written.
    storage = torch.empty(3 * row_stride + hidden, dtype=torch.float16, device=device)
    student = storage.as_strided((4, hidden), (row_stride, 1))
    values, teacher = (states.to(device, torch.float16) for states in hidden_states(4, hidden))
    student.copy_(values)
    assert_agrees_with_definition(student, teacher, scale=64.0)


def test_numerical_gradient_agrees_in_float64() -> None:
    student, teacher = hidden_states(3, 4, 5)
    mask = random_mask(3, 4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda states: cosine_loss(states, teacher, mask=mask, normalizer=7), student
    )


@pytest.mark.parametrize("student_size", [0.0, 1e-9])
def test_vectors_shorter_than_eps_are_clamped_to_eps_without_nan(student_size: float, device: str) -> None:
    student, teacher = (states.float().to(device) for states in hidden_states(3, 6))
    student[0] *= student_size
    teacher[1] = 0
    student[2], teacher[2] = 0, 0
    exact_student = student.double().requires_grad_()
    loss = cosine_loss(student.requires_grad_(), teacher)
    exact = reference.cosine_loss(exact_student, teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    gradient, exact_gradient = differentiate(loss, student), differentiate(exact, exact_student)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [*ROUNDING, torch.float64], ids=str)
def test_masked_out_rows_do_not_count_even_if_not_finite(dtype: torch.dtype, device: str) -> None:
    student, teacher = (states.to(device, dtype) for states in hidden_states(5, 6))
    student[1], teacher[2], student[3] = torch.nan, torch.inf, 0
    mask = torch.tensor([True, False, False, False, True], device=device)
    loss = cosine_loss(student.requires_grad_(), teacher, mask=mask)
    gradient = differentiate(loss, student)
    counted = student.detach()[mask].requires_grad_()
    counted_loss = cosine_loss(counted, teacher[mask])
    torch.testing.assert_close(loss, counted_loss)
    torch.testing.assert_close(gradient[mask], differentiate(counted_loss, counted))
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_included_row_that_is_not_finite_gives_nan(poison: float, device: str) -> None:
    student, teacher = (states.float().to(device) for states in hidden_states(3, 6))
    student[1, 2] = poison
    loss = cosine_loss(student.requires_grad_(), teacher)
    assert loss.isnan()
    gradient = differentiate(loss, student)
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


def test_with_the_global_normalizer_the_split_of_a_batch_does_not_matter(device: str) -> None:
    student, teacher = (states.float().to(device) for states in hidden_states(9, 16))
    student.requires_grad_()
    normalizer = torch.tensor(9, device=device)
    parts = [cosine_loss(student[r], teacher[r], normalizer=normalizer) for r in (slice(0, 2), slice(2, 9))]
    whole = cosine_loss(student, teacher)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(differentiate(sum(parts), student), differentiate(whole, student))


def test_loss_scale_is_applied_before_the_gradient_is_rounded(device: str) -> None:
    student, teacher = (states.half().to(device) for states in hidden_states(2, 768))
    loss = cosine_loss(student.requires_grad_(), teacher, normalizer=4096 * 512)
    assert (differentiate(2.0**24 * loss, student) != 0).double().mean() > 0.99


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 5)])
def test_no_included_rows_give_a_loss_and_a_gradient_of_zero(shape: tuple[int, ...], device: str) -> None:
    student = torch.randn(shape, device=device).requires_grad_()
    mask = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    loss = cosine_loss(student, torch.randn(shape, device=device), mask=mask)
    gradient = differentiate(loss, student)
    assert loss == 0
    assert gradient.shape == shape
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.memcheck
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_same_bits_from_run_to_run_and_under_autocast(dtype: torch.dtype, device: str) -> None:
    student, teacher = (states.to(device, dtype) for states in hidden_states(64, 96))
    mask = random_mask(64).to(device)
    student.requires_grad_()

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        loss = cosine_loss(student, teacher, mask=mask)
        return loss, differentiate(512 * loss, student)

    runs = [loss_and_gradient(), loss_and_gradient()]
    with torch.autocast(device, torch.bfloat16):
        runs.append(loss_and_gradient())
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("with_mask", [False, True])
def test_torch_compile_needs_no_graph_break(with_mask: bool, backend: str, device: str) -> None:
    student, teacher = (states.float().to(device) for states in hidden_states(3, 7, 24))
    mask = random_mask(3, 7).to(device) if with_mask else None
    normalizer = torch.tensor(30, device=device) if with_mask else None

    def loss(student: Tensor) -> Tensor:
        return 3 * cosine_loss(2 * student, teacher, mask=mask, normalizer=normalizer)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)(student.requires_grad_())
    torch.testing.assert_close(compiled, loss(student))
    torch.testing.assert_close(differentiate(compiled, student), differentiate(loss(student), student))


def test_operators_pass_opcheck(device: str) -> None:
    student, teacher = (states.bfloat16().to(device)[:, :8] for states in hidden_states(6, 10))
    mask, factors = random_mask(6).to(device), torch.ones(6, device=device)
    torch.library.opcheck(public.forward_operator, (student, teacher, mask))
    torch.library.opcheck(public.backward_operator, (student, teacher, None, factors, factors, factors[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_host_does_not_wait_for_the_gpu() -> None:
    student, teacher = (states.half().cuda() for states in hidden_states(4, 6))
    student.requires_grad_()
    mask, normalizer = random_mask(4).cuda(), torch.tensor(5, device="cuda")
    differentiate(cosine_loss(student, teacher, mask=mask, normalizer=normalizer), student)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"mask": mask}, {"mask": mask, "normalizer": normalizer}):
            differentiate(cosine_loss(student, teacher, **options), student)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_module_is_the_loss() -> None:
    student, teacher = hidden_states(4, 6)
    options = {"mask": random_mask(4), "normalizer": 3.0}
    assert CosineLoss()(student, teacher, **options) == cosine_loss(student, teacher, **options)


def test_second_derivative_is_refused() -> None:
    student, teacher = (states.float() for states in hidden_states(2, 6))
    loss = cosine_loss(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(loss.square(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1")
def test_triton_runs_under_the_interpreter() -> None:
    assert public.cosine_implementation(torch.zeros(1)) is public.cosine_loss_triton
