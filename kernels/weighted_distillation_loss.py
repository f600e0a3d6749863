"""Distillation loss as one weighted sum, its gradient computed together with it (public).

    loss = soft_weight * kl + hard_weight * hard_ce

with kl and hard_ce of ``distillation_loss``. Because the weights are known when the loss is computed, so is the
gradient up to the factor that ``backward`` brings, and one launch gives both: logits are read once from
memory and every exponential of the CPU path is taken once. 3 passes over memory of the size of the logits,
where ``distillation_loss`` needs 5.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.checks import check_writable, resolve_normalizer
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
    """soft_weight * kl + hard_weight * hard_ce of :func:`distillation_loss.distillation_loss`, and its parts.

    Args:
        soft_weight: weight of the soft targets.
        hard_weight: weight of the hard labels.
        loss_scale: the gradient that will arrive at ``loss``: the loss scale of fp16 training, with everything
            else the loss is multiplied by before ``backward``; a number, or a 0-dim tensor on the same
            device. With another gradient the result is still right, for one more pass over it; but in
            float16 what the expected scale did not lift above the smallest number stays lost. None: 1, and
            not allowed for float16.
        inplace: write the gradient over the storage of ``student_logits`` at once: they are gone when this
            returns. Safe where ``inplace_backward`` of ``distillation_loss`` is, and like it without effect
            under torch.compile.

    The other arguments, rows that do not count, -inf logits, labels outside the vocabulary, repeatability and
    errors are those of :func:`distillation_loss.distillation_loss`. Where the student needs no gradient none
    is computed.

    Raises:
        ValueError: as there.
        RuntimeError: in a second backward through the same graph (not under torch.compile).
    """
    if not torch.is_grad_enabled():
        student_logits = student_logits.detach()
    rows = loss_rows(student_logits, teacher_logits, labels, soft_mask, temperature, ignore_index, vocab_size)
    if loss_scale is None:
        if student_logits.dtype == torch.float16:
            raise ValueError(
                "loss_scale must be given for float16 logits; most of the gradient may lie below 6e-8"
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
    """Forward leaves the gradient behind; backward multiplies it by what the loss scale did not foresee."""

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
            # A kernel's writes are invisible to autograd; see DistillationLossFunction.
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
                "weighted_distillation_loss: its gradient was given away in the first backward; "
                "a second one through the same graph needs distillation_loss"
            )
        gradient, loss_scale = ctx.saved_tensors
        ctx.gradient_given = True
        return ops.rescale_gradient(gradient, grad_loss / loss_scale), *(None,) * 12
