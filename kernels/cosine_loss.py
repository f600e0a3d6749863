"""Masked cosine embedding loss between hidden states (public).

For row i with student hidden state h_i, teacher hidden state t_i, a_i = max(|h_i|, eps),
b_i = max(|t_i|, eps) and dot_i = h_i . t_i,

    cos_i = dot_i / (a_i b_i)        loss = 1 / normalizer * sum over masked rows of 1 - cos_i

and for g the gradient that arrives at the loss (loss scale and loss weight included)

    d/dh_i = g / normalizer * ( student_factor_i h_i  -  teacher_factor_i t_i )

    student_factor_i = cos_i / a_i^2  [|h_i| > eps]        teacher_factor_i = 1 / (a_i b_i)

in float32, rounded to the hidden states' dtype once, at the end.

Source: Sanh et al. 2019, arXiv 1910.01108, section 3 (L_cos). eps as in
torch.nn.functional.cosine_similarity: a zero vector has cosine 0.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import cosine_loss_chunked
from distilspeed.kernels.implementation.backend import TRITON_INSTALLED, accumulation_dtype, use_triton
from distilspeed.kernels.implementation.checks import (
    as_rows,
    check_pair,
    check_row_tensor,
    resolve_normalizer,
)

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
    """Mean of 1 - cos(student, teacher) over the rows of a mask; formulas at the top of this file.

    Args:
        student_hidden: [..., hidden], float16, bfloat16, float32 or float64, any strides; where they cannot
            be seen as rows without a copy, one is made.
        teacher_hidden: the same shape, dtype and device; must not require grad.
        mask: [...] bool, the rows that count. None: all.
        normalizer: what the sum is divided by: a number, or a 0-dim tensor on the same device. None: the
            number of rows that count, at least 1.

    Returns:
        A float32 scalar (float64 for float64 input). Rows that do not count contribute exactly 0, whatever
        they hold, and get a gradient of exactly 0. Nothing synchronises host and GPU, and torch.compile
        finds no graph to break. The result is the same bit for bit from run to run. A student's zero
        vector has loss 1 and, as in PyTorch, the gradient -t / (|t| eps), which float16 cannot hold.
        Norms must be below 1e19: the squares of greater ones pass float32's range, and the cosine is 0 or NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the teacher requires grad.
    """
    check_pair("hidden", student_hidden, teacher_hidden)
    check_row_tensor("mask", mask, torch.bool, student_hidden)
    divisor = resolve_normalizer("normalizer", normalizer, student_hidden, mask)
    mask_rows = None if mask is None else mask.reshape(-1).contiguous()
    return CosineLossFunction.apply(as_rows(student_hidden), as_rows(teacher_hidden), mask_rows, divisor)


class CosineLoss(nn.Module):
    """:func:`cosine_loss` as a module, for those who keep their losses in modules."""

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
    """Saves two numbers per row beside the hidden states, and no normalised copy of either."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [rows, hidden], like the teacher's with the last dimension contiguous
        teacher: Tensor,  # [rows, hidden]
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


# Operators are opaque to torch.compile, which needs no more than the fakes below to compile around them.


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
    return cosine_loss_triton if use_triton(hidden_states) else cosine_loss_chunked
