"""The distillation loss as PyTorch operators: opaque to torch.compile, which so has no graph to break.

Each picks the implementation that fits the logits' device and dtype. Their arguments are the fields of
``LossRows``, and what ``distillation_loss_rows`` says of row table, coefficients and gradient. They carry no
derivatives: those are in the autograd functions that call them.
"""

from types import ModuleType

import torch
from torch import Tensor

from distilspeed.kernels.implementation import distillation_loss_chunked
from distilspeed.kernels.implementation.backend import TRITON_INSTALLED, use_triton
from distilspeed.kernels.implementation.distillation_loss_rows import (
    LOSS_FIELDS,
    LossRows,
    RowTable,
    empty_table,
)

if TRITON_INSTALLED:
    from distilspeed.kernels.implementation import distillation_loss_triton
    from distilspeed.kernels.implementation.rescale_triton import rescale

# A factor within this many roundings of 1 is 1: a loss divided by 41 accumulation steps and multiplied by 41 again has
# such a factor, as for 74 of the counts up to 512, and the gradient would be read, written and rounded once more.
ROUNDINGS = 8


def implementation_for(logits: Tensor) -> ModuleType:
    return distillation_loss_triton if use_triton(logits) else distillation_loss_chunked


@torch.library.custom_op("distilspeed::distillation_loss_forward", mutates_args=())
def forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int,
) -> Tensor:
    rows = LossRows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    return implementation_for(student_logits).forward(rows)


@torch.library.custom_op("distilspeed::distillation_loss_backward", mutates_args=())
def backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int,
    table: Tensor,
    coefficients: Tensor,
) -> Tensor:
    rows = LossRows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    gradient = torch.empty_like(student_logits)
    implementation_for(student_logits).backward(rows, table, coefficients, gradient)
    return gradient


@torch.library.custom_op("distilspeed::distillation_loss_forward_backward", mutates_args=())
def forward_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = LossRows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    gradient = torch.empty_like(student_logits)
    losses = implementation_for(student_logits).forward_backward(rows, coefficients, gradient)
    return losses, gradient


@forward.register_fake
def _(student_logits: Tensor, *_: object) -> Tensor:
    return empty_table(student_logits, len(RowTable._fields))


@backward.register_fake
def _(student_logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(student_logits)


@forward_backward.register_fake
def _(student_logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_table(student_logits, LOSS_FIELDS), torch.empty_like(student_logits)


def rescale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient [rows, width] times a 0-dim factor of the accumulation dtype; free where that is 1 within rounding.

    Not an operator: in place, but where torch.compile plans memory itself.
    """
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype)
    tolerance = ROUNDINGS * torch.finfo(factor.dtype).eps
    if use_triton(gradient):
        rescale(gradient, factor, tolerance)
    elif not abs(factor.item() - 1) <= tolerance:  # not ">", which is false of NaN
        gradient.mul_(factor.item())
    return gradient
