"""Distillation loss as one weighted sum; its gradient is computed in the forward pass (public).

    loss = soft_weight * kl + hard_weight * hard_ce

with kl and hard_ce of ``distillation_loss``. Because the weights are known in the forward pass, the gradient is
known there, too, up to the gradient that arrives at ``loss``. One launch computes both, and the CPU path computes
every exponential once.

``distillation_loss`` moves 5 times the size of one model's logits through memory. This loss moves 3 times their size
where the second-level cache holds the rows in flight (A100, H100, H200: predicted, see docs/benchmarks.md). On a GPU
with a small cache, like a V100, it moves up to 5 times their size, too.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.checks import check_constants, check_writable, resolve_normalizer
from distilspeed.kernels.implementation.distillation_loss_rows import LOSS_FIELDS, LossRows, loss_rows, means


class WeightedLosses(NamedTuple):
    """Four scalars, float32 (float64 for float64 logits); only ``loss`` has a gradient."""

    loss: Tensor
    kl: Tensor
    soft_ce: Tensor
    hard_ce: Tensor


def weighted_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    soft_weight: float = 5.0,
    hard_weight: float = 2.0,
    loss_scale: float | Tensor | None = None,
    temperature: float = 2.0,
    soft_mask: Tensor | None = None,
    soft_normalizer: float | Tensor | None = None,
    hard_normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    inplace: bool = False,
) -> WeightedLosses:
    """Return soft_weight * kl + hard_weight * hard_ce of :func:`distillation_loss.distillation_loss`, and its parts.

    Args:
        soft_weight: weight of the soft targets.
        hard_weight: weight of the hard labels.
        loss_scale: the expected gradient at ``loss``: the loss scale of fp16 training times every other factor
            that multiplies the loss before ``backward``; a number, or a 0-dim tensor on the same device. If
            another gradient arrives, the result is corrected by one more pass over it; in float16, entries
            that underflowed under the expected scale stay 0. None: 1; not allowed for float16.
        inplace: write the gradient over the storage of ``student_logits`` in this call. The logits are gone
            when it returns. Safe under the conditions of ``inplace_backward`` of ``distillation_loss``; no
            effect under torch.compile.

    The other arguments, masked-out rows, -inf logits, labels outside the vocabulary, reproducibility and errors
    are those of :func:`distillation_loss.distillation_loss`. No gradient is computed if the student needs none.

    Raises:
        ValueError: as in ``distillation_loss``, or loss_scale is missing for float16.
        RuntimeError: on a second backward through the same graph (not under torch.compile).
    """
    if not torch.is_grad_enabled():
        student_logits = student_logits.detach()
    rows = loss_rows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    check_constants(soft_weight=soft_weight, hard_weight=hard_weight)
    if loss_scale is None:
        if student_logits.dtype == torch.float16:
            raise ValueError(
                "loss_scale must be given for float16 logits; without it gradient entries below 6e-8 become 0"
            )
        loss_scale = 1.0
    if inplace:
        check_writable(student_logits, rows.student_logits)
    return WeightedLosses(
        *WeightedDistillationLossFunction.apply(
            *rows,
            resolve_normalizer("soft_normalizer", soft_normalizer, rows.student_logits, rows.soft_mask),
            resolve_normalizer("hard_normalizer", hard_normalizer, rows.student_logits, rows.labelled),
            resolve_normalizer("loss_scale", loss_scale, rows.student_logits, None),
            soft_weight,
            hard_weight,
            inplace and not torch.compiler.is_compiling(),
        )
    )


class WeightedDistillationLossFunction(torch.autograd.Function):
    """Forward computes and saves the gradient; backward corrects it if another gradient than loss_scale arrives."""

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
        loss_scale: Tensor,  # 0-dim
        soft_weight: float,
        hard_weight: float,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = LossRows(
            student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size
        )
        coefficients = torch.stack(
            (
                soft_weight * temperature * loss_scale / soft_normalizer,
                hard_weight * loss_scale / hard_normalizer,
            )
        )
        if not ctx.needs_input_grad[0]:
            losses = ops.forward(*rows)[:LOSS_FIELDS]
        elif inplace:
            gradient = student_logits.detach()
            losses = ops.implementation_for(gradient).forward_backward(rows, coefficients, gradient)
            # Autograd does not see a kernel's writes; see DistillationLossFunction.
            torch.autograd.graph.increment_version(student_logits)
        else:
            losses, gradient = ops.forward_backward(*rows, coefficients)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(gradient, loss_scale)
        ctx.gradient_given = False
        kl, soft_ce, hard_ce = means(losses.sum(1), temperature, soft_normalizer, hard_normalizer)
        ctx.mark_non_differentiable(kl, soft_ce, hard_ce)
        return soft_weight * kl + hard_weight * hard_ce, kl, soft_ce, hard_ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        if ctx.gradient_given:
            raise RuntimeError(
                "weighted_distillation_loss: the first backward has used its gradient; "
                "use distillation_loss to call backward twice"
            )
        gradient, loss_scale = ctx.saved_tensors
        ctx.gradient_given = True
        return ops.rescale_gradient(gradient, grad_loss / loss_scale), *(None,) * 12
