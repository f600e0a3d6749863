"""The linear distillation loss as a custom PyTorch operator: four products and the losses per chunk of rows."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from distilspeed.kernels.implementation.backend import accumulation_dtype
from distilspeed.kernels.implementation.distillation_loss_ops import implementation_for
from distilspeed.kernels.implementation.distillation_loss_rows import LOSS_FIELDS, LossRows
from distilspeed.kernels.implementation.launch_configs import padded_width

PRODUCT_PART_BYTES = 4 * 2**20  # in float32


class Projections(NamedTuple):
    """Hidden states and projections of both models."""

    student_hidden: Tensor  # [..., student hidden size]
    student_weight: Tensor  # [width, student hidden size]
    student_bias: Tensor | None  # [width]
    teacher_hidden: Tensor  # [..., teacher hidden size]
    teacher_weight: Tensor  # [teacher's width, teacher hidden size]
    teacher_bias: Tensor | None  # [teacher's width]

    def as_rows(self) -> Self:
        return self._replace(
            student_hidden=self.student_hidden.reshape(-1, self.student_hidden.shape[-1]),
            teacher_hidden=self.teacher_hidden.reshape(-1, self.teacher_hidden.shape[-1]),
        )


@torch.library.custom_op("distilspeed::linear_distillation_loss", mutates_args=())
def forward_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int,
    coefficients: Tensor,
    chunk_bytes: int,
    needs_gradient: list[bool],  # of student_hidden, student_weight, student_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss sums [3] and the gradients for ``coefficients``; a gradient that is not needed is empty.

    The gradients are of the hidden states [rows, hidden size], in their dtype, and of weight [width, hidden size]
    and bias [1, width], in the accumulation dtype.
    """
    num_rows, width, teacher_width = student_hidden.shape[0], student_weight.shape[0], teacher_weight.shape[0]
    needs_hidden, needs_weight, needs_bias = needs_gradient
    implementation = implementation_for(student_hidden)
    columns = logits_width(width, student_hidden.device), logits_width(teacher_width, student_hidden.device)
    student_weight, teacher_weight = map(padded_rows, (student_weight, teacher_weight), columns)
    student_bias = None if student_bias is None else padded_rows(student_bias, columns[0])
    teacher_bias = None if teacher_bias is None else padded_rows(teacher_bias, columns[1])
    losses, hidden_gradient, weight_gradient, bias_gradient = new_results(
        student_hidden, columns[0], needs_gradient
    )

    chunk_rows = balanced_chunk(num_rows, chunk_bytes // (sum(columns) * student_hidden.itemsize))
    buffers = [student_hidden.new_empty((chunk_rows, of_model)) for of_model in columns]
    for first in range(0, num_rows, chunk_rows):
        chunk = slice(first, first + chunk_rows)
        hidden = student_hidden[chunk]
        student_logits, teacher_logits = (buffer[: len(hidden)] for buffer in buffers)
        project(hidden, student_weight, student_bias, student_logits)
        project(teacher_hidden[chunk], teacher_weight, teacher_bias, teacher_logits)
        rows = LossRows(
            student_logits,
            teacher_logits,
            None if labels is None else labels[chunk],
            None if soft_mask is None else soft_mask[chunk],
            temperature,
            ignore_index,
            vocab_size,
        )
        if not any(needs_gradient):
            losses += implementation.forward(rows)[:LOSS_FIELDS].sum(1)
            continue
        losses += implementation.forward_backward(rows, coefficients, student_logits).sum(1)
        gradient = student_logits  # 0 in the padding
        if needs_hidden:
            torch.mm(gradient, student_weight, out=hidden_gradient[chunk])
        if needs_weight:
            counted = rows.counted
            # A masked-out row may hold NaN, and 0 times NaN is NaN.
            clean = hidden if counted is None else hidden.where(counted[:, None], 0)
            add_product(weight_gradient, gradient.T, clean)
        if needs_bias:
            bias_gradient += gradient.sum(0, dtype=bias_gradient.dtype)
    return losses, hidden_gradient, weight_gradient[:width], bias_gradient[..., :width]


@forward_backward.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_results(student_hidden, student_weight.shape[0], arguments[-1])


def new_results(
    student_hidden: Tensor, width: int, needs_gradient: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_rows, hidden_size), dtype = student_hidden.shape, accumulation_dtype(student_hidden)
    needs_hidden, needs_weight, needs_bias = needs_gradient
    zeros, empty = student_hidden.new_zeros, student_hidden.new_empty
    return (
        zeros(LOSS_FIELDS, dtype=dtype),
        empty((num_rows, hidden_size) if needs_hidden else 0),
        zeros((width, hidden_size) if needs_weight else 0, dtype=dtype),
        zeros((1, width) if needs_bias else 0, dtype=dtype),
    )


def logits_width(width: int, device: torch.device) -> int:
    """Return the width of the logits' buffers: on GPUs a multiple of 64.

    For outputs of other widths, or that are not contiguous, cuBLAS takes slower kernels and adds the bias in a pass.
    """
    return padded_width(width) if device.type == "cuda" else width


def padded_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return a weight [width, hidden size] or a bias [width] with rows of 0 at its end, ``rows`` in all."""
    if len(tensor) == rows:
        return tensor
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, rows - len(tensor)))


def balanced_chunk(num_rows: int, most: int) -> int:
    """Return the rows per chunk: as few chunks as memory allows, all of nearly the same size."""
    chunks = -(-num_rows // max(1, most))
    return max(1, -(-num_rows // max(1, chunks)))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right, accumulating in the dtype of ``total``.

    On a CPU the product of bfloat16 inputs is rounded to bfloat16 before it is added. float16 inputs are converted
    first, because their product may overflow float16.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:  # in parts, so that their conversion to the dtype of the total stays in cache
        if right.dtype == torch.float16:
            right = right.to(total.dtype)
        part_rows = max(1, PRODUCT_PART_BYTES // (right.shape[1] * total.itemsize))
        with torch.autocast(total.device.type, enabled=False):  # it would convert them back
            for part, left_part in zip(total.split(part_rows), left.split(part_rows), strict=True):
                part += left_part.to(right.dtype) @ right
