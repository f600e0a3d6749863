"""Distillation loss on raw logits: softened teacher targets and hard labels in one pass (public).

For row i with student logits z_i, teacher logits u_i, label y_i and temperature T,

    p_i = softmax(u_i / T)        q_i = softmax(z_i / T)

    kl      = T^2 / soft_normalizer * sum over soft rows      of  sum_v p_iv (log p_iv - log q_iv)
    soft_ce = T^2 / soft_normalizer * sum over soft rows      of  sum_v -p_iv log q_iv
    hard_ce =   1 / hard_normalizer * sum over labelled rows  of  -log softmax(z_i)[y_i]

and with g_x the gradient of the final loss with respect to loss x (loss scale and loss weight included)

    d/dz_iv = (g_kl + g_soft_ce) T / soft_normalizer (q_iv - p_iv)                [i is a soft row]
            + g_hard_ce / hard_normalizer (softmax(z_i)_v - [v = y_i])            [i is labelled]

computed in float32 and rounded to the logits' dtype once, at the end: the gradient entries of a row of 30522
logits, averaged over a batch, underflow float16 unless the loss scale is applied before rounding.

Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2 (and the factor T^2); as used in
Sanh et al. 2019, arXiv 1910.01108, section 3. T^2 * KL is the reported L_ce; kl and soft_ce have the same gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.checks import (
    check_can_be_saved,
    check_writable,
    resolve_normalizer,
)
from distilspeed.kernels.implementation.distillation_loss_rows import LOSS_FIELDS, LossRows, loss_rows, means
from distilspeed.kernels.implementation.weighted_module import WeightedLossModule


class DistillationLosses(NamedTuple):
    """Three differentiable scalars, float32 (float64 for float64 logits)."""

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
    """Return the distillation losses of a student against a frozen teacher; formulas at the top of this file.

    Args:
        student_logits: [..., width], float16, bfloat16, float32 or float64, before any softmax or
            temperature. Any strides. Copied if the strides do not allow a view as rows.
        teacher_logits: the same shape, dtype and device; must not require grad. The width may differ if
            ``vocab_size`` is given.
        labels: [...] int64, ``ignore_index`` in unlabelled rows. None: hard_ce is 0.
        temperature: T > 0. It applies to the soft terms only.
        soft_mask: [...] bool, True for the rows of the soft terms. None: all rows.
        soft_normalizer: divisor of the soft sums: a number, or a 0-dim tensor on the same device (a mean
            over a global batch then needs no synchronisation). None: the number of soft rows of this call,
            at least 1. The value of a tensor is not checked: 0 gives inf or NaN.
        hard_normalizer: the same for the labelled rows.
        ignore_index: the label of unlabelled rows.
        vocab_size: the number of real columns if the logits of one or both models are padded to a larger width.
            Padding columns are excluded from every softmax, whatever they hold, and get a gradient of exactly 0.
            None: the whole width.
        inplace_backward: write the gradient over the storage of ``student_logits`` instead of allocating
            it. Safe if the operation that produced ``student_logits`` did not save it for its own backward
            (a linear layer does not) and nothing reads it after ``backward``. If the operation did save it,
            autograd raises its version error. No effect under torch.compile, which plans memory itself.

    Rows that are neither soft nor labelled are not read, and get a gradient of exactly 0. A student logit of
    -inf means probability 0: it contributes 0 if the teacher's probability is 0, too, and otherwise makes the
    loss +inf. The result is undefined for a row whose logits are all below -1e30, and on a GPU for logits above 1e9 at
    temperatures above 90.

    A label outside [0, vocab_size) other than ``ignore_index`` raises on the CPU. On a GPU, where a check
    would synchronise, hard_ce becomes NaN instead; no memory is read out of bounds.

    The Triton implementation does not synchronise host and GPU. Results are bitwise reproducible.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the teacher or a setting requires grad, the teacher's logits
            come from ``torch.inference_mode()``, the temperature is not a positive number, labels (on the CPU) are out
            of range, or the logits cannot be overwritten.
        RuntimeError: on a second backward through the same graph after ``inplace_backward``.
    """
    rows = loss_rows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    check_can_be_saved("logits", student_logits, teacher_logits)
    if inplace_backward:
        check_writable(student_logits, rows.student_logits)
    losses = DistillationLossFunction.apply(
        *rows,
        resolve_normalizer("soft_normalizer", soft_normalizer, rows.student_logits, rows.soft_mask),
        resolve_normalizer("hard_normalizer", hard_normalizer, rows.student_logits, rows.labelled),
        # torch.compile plans memory itself.
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
    """Normalizers, T^2 and autograd around the implementation for the device."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # [rows, width]
        teacher_logits: Tensor,  # [rows, teacher's width]
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
                "distillation_loss: inplace_backward has overwritten the student's logits with their gradient; "
                "for a second backward set inplace_backward=False"
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
        # Autograd does not see a kernel's writes; without this, an operation that saved the logits
        # would silently use the gradient in their place.
        torch.autograd.graph.increment_version(rows.student_logits)
        return gradient, *(None,) * 9
