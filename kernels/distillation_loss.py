"""Distillation loss on raw logits: softened teacher targets and hard labels in one pass (public).

For row i with student logits z_i, teacher logits u_i, label y_i and temperature T,

    p_i = softmax(u_i / T)        q_i = softmax(z_i / T)

    kl      = T^2 / soft_normalizer * sum over soft rows      of  sum_v p_iv (log p_iv - log q_iv)
    soft_ce = T^2 / soft_normalizer * sum over soft rows      of  sum_v -p_iv log q_iv
    hard_ce =   1 / hard_normalizer * sum over labelled rows  of  -log softmax(z_i)[y_i]

and for g_x the gradient that arrives at loss x (loss scale and loss weight included)

    d/dz_iv = (g_kl + g_soft_ce) T / soft_normalizer (q_iv - p_iv)                [i is a soft row]
            + g_hard_ce / hard_normalizer (softmax(z_i)_v - [v = y_i])            [i is labelled]

computed in float32 and rounded to the logits' dtype once, at the end: a gradient row of 30522 entries
averaged over a batch lies below the smallest float16, and only the loss scale lifts it above.

Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2 (and the factor T^2); as used in
Sanh et al. 2019, arXiv 1910.01108, section 3. T^2 * KL is the reported L_ce; its gradient is soft_ce's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.checks import check_writable, resolve_normalizer
from distilspeed.kernels.implementation.distillation_loss_rows import LOSS_FIELDS, LossRows, loss_rows, means
from distilspeed.kernels.implementation.weighted_module import WeightedLossModule


class DistillationLosses(NamedTuple):
    """Three scalars, float32 (float64 for float64 logits), each usable in a weighted sum."""

    kl: Tensor
    soft_ce: Tensor
    hard_ce: Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    soft_mask: Tensor | None = None,
    soft_normalizer: float | Tensor | None = None,
    hard_normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
) -> DistillationLosses:
    """Distillation losses of a student against a frozen teacher; formulas at the top of this file.

    Args:
        student_logits: [..., width], float16, bfloat16, float32 or float64, before any softmax or
            temperature. Any strides; where they cannot be seen as rows without a copy, one is made.
        teacher_logits: the same shape, dtype and device; must not require grad.
        labels: [...] int64, ``ignore_index`` in rows without one. None: hard_ce is 0.
        temperature: T > 0. It applies to the soft terms only.
        soft_mask: [...] bool, the rows that count in the soft terms. None: all.
        soft_normalizer: what the soft sum is divided by: a number, or a 0-dim tensor on the same device
            (so that the mean over a global batch needs no synchronisation). None: the number of soft
            rows of this call, at least 1. A tensor is not checked: 0 gives inf or NaN.
        hard_normalizer: likewise for labelled rows.
        ignore_index: the label that marks a row without one.
        vocab_size: the number of real columns where the logits are padded to a greater width. Padding
            is never in a softmax and gets a gradient of exactly 0. None: the whole width.
        inplace_backward: write the gradient over the storage of ``student_logits`` instead of allocating
            it. Safe when ``student_logits`` is the output of an operation that did not save it for its
            own backward (a linear layer does not) and nobody reads it after ``backward``; an operation
            that did save it raises autograd's version error. Without effect under torch.compile, which
            plans memory itself.

    Rows that are neither soft nor labelled are not read, and get a gradient of exactly 0. A logit of -inf is
    a class of probability 0: it adds nothing where the teacher's is 0, and makes the loss +inf where the
    teacher's is not. A row without a logit above -1e30 is undefined.

    A label outside [0, vocab_size) other than ``ignore_index`` raises on the CPU. On a GPU nothing
    waits for the labels to be checked: hard_ce becomes NaN, and no memory is read out of bounds.

    Where Triton runs, nothing here synchronises host and GPU. The result is the same bit for bit from run
    to run.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the teacher requires grad, the temperature is not
            a positive number, labels (on the CPU) are out of range, or the logits cannot be written over.
        RuntimeError: in a second backward through the same graph after ``inplace_backward``.
    """
    rows = loss_rows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    if inplace_backward:
        check_writable(student_logits, rows.student_logits)
    losses = DistillationLossFunction.apply(
        *rows,
        resolve_normalizer("soft_normalizer", soft_normalizer, rows.student_logits, rows.soft_mask),
        resolve_normalizer("hard_normalizer", hard_normalizer, rows.student_logits, rows.labelled),
        # What was compiled plans its own memory; there the flag is a hint that is not needed.
        inplace_backward and not torch.compiler.is_compiling(),
    )
    return DistillationLosses(*losses)


class DistillationLoss(WeightedLossModule):
    """soft_weight * kl + hard_weight * hard_ce as one scalar; see :func:`distillation_loss`.

    The defaults are those of Sanh et al. 2019 without the cosine term, which acts on hidden states.
    """

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        soft_mask: Tensor | None = None,
        soft_normalizer: float | Tensor | None = None,
        hard_normalizer: float | Tensor | None = None,
        vocab_size: int | None = None,
    ) -> Tensor:
        losses = distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            soft_mask=soft_mask,
            soft_normalizer=soft_normalizer,
            hard_normalizer=hard_normalizer,
            vocab_size=vocab_size,
        )
        return self.soft_weight * losses.kl + self.hard_weight * losses.hard_ce


class DistillationLossFunction(torch.autograd.Function):
    """Normalizers, T^2 and autograd's bookkeeping around the implementation that fits the device."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # [rows, width]
        teacher_logits: Tensor,  # [rows, width]
        labels: Tensor | None,  # [rows]
        soft_mask: Tensor | None,  # [rows]
        temperature: float,
        ignore_index: int,
        vocab_size: int,
        soft_normalizer: Tensor,  # 0-dim
        hard_normalizer: Tensor,  # 0-dim
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        settings = (temperature, ignore_index, vocab_size)
        table = ops.forward(student_logits, teacher_logits, labels, soft_mask, *settings)
        ctx.save_for_backward(
            student_logits, teacher_logits, labels, soft_mask, soft_normalizer, hard_normalizer, table
        )
        ctx.settings = settings
        ctx.inplace_backward = inplace_backward
        ctx.logits_overwritten = False
        return means(table[:LOSS_FIELDS].sum(1), temperature, soft_normalizer, hard_normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor, grad_soft_ce: Tensor, grad_hard_ce: Tensor) -> tuple[Any, ...]:
        if ctx.logits_overwritten:
            raise RuntimeError(
                "distillation_loss: inplace_backward has written the gradient over the student's logits; "
                "a second backward through them needs inplace_backward=False"
            )
        *tensors, soft_normalizer, hard_normalizer, table = ctx.saved_tensors
        rows = LossRows(*tensors, *ctx.settings)
        soft_coefficient = (grad_kl + grad_soft_ce) * rows.temperature / soft_normalizer
        coefficients = torch.stack((soft_coefficient, grad_hard_ce / hard_normalizer))
        if not ctx.inplace_backward:
            return ops.backward(*rows, table, coefficients), *(None,) * 9

        gradient = rows.student_logits.detach()
        ops.implementation_for(gradient).backward(rows, table, coefficients, gradient)
        ctx.logits_overwritten = True
        # A kernel's writes are invisible to autograd; without this, an operation that saved the
        # logits would go on with gradients in their place.
        torch.autograd.graph.increment_version(rows.student_logits)
        return gradient, *(None,) * 9
