"""Masked cosine embedding loss between hidden states (public).

For row i with student hidden state h_i, teacher hidden state t_i, a_i = max(|h_i|, eps),
b_i = max(|t_i|, eps) and dot_i = h_i . t_i,

    cos_i = dot_i / (a_i b_i)        loss = 1 / normalizer * sum over masked rows of 1 - cos_i

and for g the gradient that arrives at the loss (loss scale and loss weight included)

    d/dh_i = -g / normalizer * ( t_i / (a_i b_i)  -  cos_i h_i / a_i^2  [|h_i| > eps] )

in float32, rounded to the hidden states' dtype once, at the end.

Source: Sanh et al. 2019, arXiv 1910.01108, section 3 (L_cos). eps as in
torch.nn.functional.cosine_similarity: a zero vector has cosine 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilspeed.kernels.backend import accumulation_dtype
from distilspeed.kernels.checks import check_pair, check_row_tensor, resolve_normalizer

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
        student_hidden: [..., hidden], float16, bfloat16, float32 or float64, any strides.
        teacher_hidden: the same shape, dtype and device; must not require grad.
        mask: [...] bool, the rows that count. None: all.
        normalizer: what the sum is divided by: a number, or a 0-dim tensor on the same device. None: the
            number of rows that count, at least 1.

    Returns:
        A float32 scalar (float64 for float64 input). Rows that do not count contribute exactly 0, whatever
        they hold, and get a gradient of exactly 0. Nothing synchronises host and GPU. A student's zero
        vector has loss 1 and, as in PyTorch, the gradient -t / (|t| eps), which float16 cannot hold.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the teacher requires grad.
    """
    check_pair("hidden", student_hidden, teacher_hidden)
    check_row_tensor("mask", mask, torch.bool, student_hidden)
    divisor = resolve_normalizer("normalizer", normalizer, student_hidden, mask)
    return CosineLossFunction.apply(student_hidden, teacher_hidden, mask, divisor)


class CosineLossFunction(torch.autograd.Function):
    """Saves three numbers per row beside the hidden states, and no normalised copy of either."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # [..., hidden]
        teacher_hidden: Tensor,  # [..., hidden]
        mask: Tensor | None,  # [...]
        normalizer: Tensor,  # 0-dim
    ) -> Tensor:
        dtype = accumulation_dtype(student_hidden)
        student_norm = torch.linalg.vector_norm(student_hidden, dim=-1, dtype=dtype).clamp_(min=EPS)
        teacher_norm = torch.linalg.vector_norm(teacher_hidden, dim=-1, dtype=dtype).clamp_(min=EPS)
        dot = (student_hidden.to(dtype) * teacher_hidden.to(dtype)).sum(-1)
        row_losses = 1 - dot / (student_norm * teacher_norm)
        if mask is not None:
            row_losses = torch.where(mask, row_losses, 0)
        ctx.save_for_backward(
            student_hidden, teacher_hidden, mask, normalizer, student_norm, teacher_norm, dot
        )
        return row_losses.sum() / normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        student_hidden, teacher_hidden, mask, normalizer, student_norm, teacher_norm, dot = ctx.saved_tensors
        scale = -grad_loss / normalizer
        teacher_factor = scale / (student_norm * teacher_norm)
        # Below eps the norm is held constant, and so has no derivative.
        student_factor = torch.where(student_norm > EPS, teacher_factor * dot / student_norm.square(), 0)
        gradient = teacher_hidden * teacher_factor.unsqueeze(-1)
        gradient -= student_hidden * student_factor.unsqueeze(-1)
        if mask is not None:
            gradient.masked_fill_(~mask.unsqueeze(-1), 0)
        return gradient.to(student_hidden.dtype), None, None, None
