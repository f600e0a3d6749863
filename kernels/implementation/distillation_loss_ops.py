"""The distillation loss as custom PyTorch operators: opaque to torch.compile, so that they cause no graph break.

Each operator calls the implementation for the logits' device and dtype. The arguments are the fields of
``LossRows`` and the row table, coefficients and gradient of ``distillation_loss_rows``. The operators have no
derivatives; the autograd functions that call them do.
"""

from types import ModuleType

import torch
from torch import Tensor

from distilspeed.kernels.implementation import distillation_loss_chunked, distillation_loss_cpp
from distilspeed.kernels.implementation.backend import TRITON_INSTALLED, use_triton
from distilspeed.kernels.implementation.cpu_kernels import use_cpp
from distilspeed.kernels.implementation.distillation_loss_rows import (
    LOSS_FIELDS,
    LossRows,
    RowTable,
    empty_table,
)

if TRITON_INSTALLED:
    from distilspeed.kernels.implementation import distillation_loss_triton
    from distilspeed.kernels.implementation.rescale_triton import rescale

# A factor within this many roundings of 1 counts as 1. A loss divided by 41 accumulation steps and multiplied by 41
# has such a factor (74 of the step counts up to 512 do); without the tolerance the gradient would be read, written
# and rounded once more.
ROUNDINGS = 8


def implementation_for(logits: Tensor) -> ModuleType:
    if use_triton(logits):
        return distillation_loss_triton
    return distillation_loss_cpp if use_cpp(logits) else distillation_loss_chunked


def empty_gradient(student_logits: Tensor) -> Tensor:
    # Overlapping rows, as of unfold, have strides from which empty_like makes columns.
    return torch.empty_like(student_logits, memory_format=torch.contiguous_format)


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
    gradient = empty_gradient(student_logits)
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
    gradient = empty_gradient(student_logits)
    losses = implementation_for(student_logits).forward_backward(rows, coefficients, gradient)
    return losses, gradient


@forward.register_fake
def _(student_logits: Tensor, *_: object) -> Tensor:
    return empty_table(student_logits, len(RowTable._fields))


@backward.register_fake
def _(student_logits: Tensor, *_: object) -> Tensor:
    return empty_gradient(student_logits)


@forward_backward.register_fake
def _(student_logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_table(student_logits, LOSS_FIELDS), empty_gradient(student_logits)


def rescale_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return a gradient [rows, width] times a 0-dim factor of the accumulation dtype; skipped if the factor is 1.

    Multiplies in place, except under torch.compile, which plans memory itself; so this is not an operator.
    """
    if torch.compiler.is_compiling():
        return (gradient.to(factor.dtype) * factor).to(gradient.dtype)
    tolerance = ROUNDINGS * torch.finfo(factor.dtype).eps
    if use_triton(gradient):
        rescale(gradient, factor, tolerance)
    elif not abs(factor.item() - 1) <= tolerance:  # not ">", which is false for NaN
        gradient.mul_(factor.item())
    return gradient
