"""Masked cosine embedding loss between hidden states (public).

For row i with student hidden state h_i, teacher hidden state t_i, a_i = max(|h_i|, eps),
b_i = max(|t_i|, eps) and dot_i = h_i . t_i,

    cos_i = dot_i / (a_i b_i)        loss = 1 / normalizer * sum over masked rows of 1 - cos_i

and with g the gradient of the final loss with respect to this loss (loss scale and loss weight included)

    d/dh_i = g / normalizer * ( student_factor_i h_i  -  teacher_factor_i t_i )

    student_factor_i = cos_i / a_i^2  [|h_i| > eps]        teacher_factor_i = 1 / (a_i b_i)

computed in float32 and rounded to the hidden states' dtype once, at the end.

Source: Sanh et al. 2019, arXiv 1910.01108, section 3 (L_cos). eps as in
torch.nn.functional.cosine_similarity: a zero vector has cosine 0.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import cosine_loss_chunked, cosine_loss_cpp
from distilspeed.kernels.implementation.backend import TRITON_INSTALLED, accumulation_dtype, use_triton
from distilspeed.kernels.implementation.checks import (
    as_rows,
    check_can_be_saved,
    check_pair,
    check_row_tensor,
    resolve_normalizer,
)
from distilspeed.kernels.implementation.cpu_kernels import use_cpp

if TRITON_INSTALLED:
    from distilspeed.kernels.implementation import cosine_loss_triton

EPS = 1e-8


def cosine_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Return the mean of 1 - cos(student, teacher) over the rows of a mask; formulas at the top of this file.

    Args:
        student_hidden: [..., hidden], float16, bfloat16, float32 or float64, any strides. Copied if the
            strides do not allow a view as rows.
        teacher_hidden: the same shape, dtype and device; must not require grad.
        mask: [...] bool, True for the rows to include. None: all rows.
        normalizer: divisor of the sum: a number, or a 0-dim tensor on the same device. None: the number of
            included rows, at least 1.

    Returns:
        A float32 scalar (float64 for float64 input). Masked-out rows contribute exactly 0 and get a gradient
        of exactly 0, even if they hold NaN. The call does not synchronise host and GPU, causes no graph break
        under torch.compile, and is bitwise reproducible. A zero student vector has loss 1 and, as in
        PyTorch, the gradient -t / (|t| eps), which overflows float16. Norms must be below 1e19: squares of
        larger norms overflow float32, and the cosine becomes 0 or NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the teacher or the normalizer requires grad, or the
            teacher's states come from ``torch.inference_mode()``.
    """
    check_pair("hidden", student_hidden, teacher_hidden)
    check_can_be_saved("hidden", student_hidden, teacher_hidden)
    check_row_tensor("mask", mask, torch.bool, student_hidden)
    divisor = resolve_normalizer("normalizer", normalizer, student_hidden, mask)
    mask_rows = None if mask is None else mask.reshape(-1).contiguous()
    return CosineLossFunction.apply(as_rows(student_hidden), as_rows(teacher_hidden), mask_rows, divisor)


class CosineLoss(nn.Module):
    """:func:`cosine_loss` as a module."""

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        *,
        mask: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return cosine_loss(student_hidden, teacher_hidden, mask=mask, normalizer=normalizer)


class CosineLossFunction(torch.autograd.Function):
    """Saves the hidden states and two numbers per row; no normalised copies."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [rows, hidden], last dimension contiguous
        teacher: Tensor,  # [rows, hidden], last dimension contiguous
        mask: Tensor | None,  # [rows]
        normalizer: Tensor,  # 0-dim
    ) -> Tensor:
        row_losses, student_factor, teacher_factor = forward_operator(student, teacher, mask)
        ctx.save_for_backward(student, teacher, mask, student_factor, teacher_factor, normalizer)
        return row_losses.sum() / normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        *rows_and_factors, normalizer = ctx.saved_tensors
        return backward_operator(*rows_and_factors, grad_loss / normalizer), None, None, None


# Custom operators are opaque to torch.compile: with the fakes below it compiles around them without a graph break.


@torch.library.custom_op("distilspeed::cosine_loss_forward", mutates_args=())
def forward_operator(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return cosine_implementation(student).forward(student, teacher, mask, EPS)


@torch.library.custom_op("distilspeed::cosine_loss_backward", mutates_args=())
def backward_operator(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    student_factor: Tensor,
    teacher_factor: Tensor,
    scale: Tensor,
) -> Tensor:
    return cosine_implementation(student).backward(
        student, teacher, mask, student_factor, teacher_factor, scale
    )


@forward_operator.register_fake
def _(student: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student)
    row_losses, student_factor, teacher_factor = (
        student.new_empty(student.shape[0], dtype=dtype) for _ in range(3)
    )
    return row_losses, student_factor, teacher_factor


@backward_operator.register_fake
def _(student: Tensor, *_: object) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def cosine_implementation(hidden_states: Tensor) -> ModuleType:
    if use_triton(hidden_states):
        return cosine_loss_triton
    return cosine_loss_cpp if use_cpp(hidden_states) else cosine_loss_chunked
