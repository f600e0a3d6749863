"""Distillation loss from hidden states: vocabulary projections and loss, one chunk of rows at a time (public).

With student hidden states h [rows, H_s], projection W [V, H_s] and bias b [V], and the teacher's k, U, d, the
logits of a chunk of rows are z = h W^T + b and u = k U^T + d, the loss is that of
``weighted_distillation_loss``, and with g = dL/dz of the chunk

    dL/dh = g W        dL/dW = sum over chunks of g^T h        dL/db = sum over rows of g

g overwrites z, so only one chunk of both models' logits exists at a time. cuBLAS or oneDNN computes the four
products, the kernels of ``distillation_loss`` the rest. All gradients are computed in the forward pass:
computing them in the backward pass would repeat the two products with W and U.

In float16, g is computed with coefficients that add up to GRADIENT_SIZE, which keeps it within float16's range
for any loss scale and normalizers. The ratio to the actual coefficients is multiplied in float32 at the end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilspeed.kernels.implementation import distillation_loss_ops as ops
from distilspeed.kernels.implementation.checks import (
    check_constants,
    check_floating_point,
    check_row_tensor,
    check_settings,
    resolve_normalizer,
)
from distilspeed.kernels.implementation.distillation_loss_rows import means
from distilspeed.kernels.implementation.linear_distillation_loss_ops import Projections, forward_backward
from distilspeed.kernels.implementation.weighted_module import WeightedLossModule
from distilspeed.kernels.weighted_distillation_loss import WeightedLosses

# Bounds every entry of g, and half the sum of a row's absolute entries: a product with weights below 60 stays in
# float16's range. The average of 30522 entries is still a normal float16 number.
GRADIENT_SIZE = 512.0

CPU_CHUNK_BYTES = 48 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    soft_weight: float = 5.0,
    hard_weight: float = 2.0,
    temperature: float = 2.0,
    soft_mask: Tensor | None = None,
    soft_normalizer: float | Tensor | None = None,
    hard_normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
) -> WeightedLosses:
    """Return ``weighted_distillation_loss`` of two vocabulary projections, without storing all logits at once.

    Args:
        student_hidden: [..., student hidden size], float16, bfloat16, float32 or float64: the input of the
            vocabulary projection (in BERT's MLM head: the output of its transform).
        student_weight: [width, student hidden size], the same dtype, for example the tied input embeddings.
        teacher_hidden: [..., teacher hidden size], the same leading dimensions and dtype; frozen.
        teacher_weight: [teacher's width, teacher hidden size]; frozen. If it has another width than the student's,
            give ``vocab_size``.
        labels: [...] int64, ``ignore_index`` in unlabelled rows.
        student_bias: [width], the student weight's dtype; None: no bias.
        teacher_bias: [teacher's width], frozen.
        chunk_bytes: memory for one chunk of logits, both models together. None: 48 MiB on a CPU,
            512 MiB on a GPU. Smaller chunks make the products slower.

    The other arguments are those of ``weighted_distillation_loss``; a loss scale is not needed here. Masked-out rows do
    not matter, even if they hold NaN. Rows of ``student_weight`` from ``vocab_size`` on must be finite. Under
    autocast the projections run in the autocast dtype, like ``torch.nn.functional.linear``.

    Memory: one chunk of logits and the gradients: [..., student hidden size], and the weight's in float32. On a GPU,
    a width that is no multiple of 64 also costs a padded copy of its weight.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the teacher requires grad, or a setting or (on the
            CPU) a label is out of range.
        RuntimeError: on a second backward through the same graph.
    """
    projections = Projections(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    check_floating_point("student_hidden", student_hidden)
    check_frozen(projections)
    check_constants(soft_weight=soft_weight, hard_weight=hard_weight)
    device = student_hidden.device.type
    if (
        torch.is_autocast_enabled(device) and student_hidden.dtype != torch.float64
    ):  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        projections = Projections._make(None if part is None else part.to(dtype) for part in projections)
    if not torch.is_grad_enabled():
        projections = Projections._make(None if part is None else part.detach() for part in projections)
    check_fit(projections, same_width=vocab_size is None)
    check_row_tensor("labels", labels, torch.int64, student_hidden)
    check_row_tensor("soft_mask", soft_mask, torch.bool, student_hidden)
    width = min(student_weight.shape[0], teacher_weight.shape[0])
    vocab_size = check_settings(temperature, vocab_size, width)
    labelled = None if labels is None else labels != ignore_index
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES
    return WeightedLosses(
        *LinearDistillationLossFunction.apply(
            *projections.as_rows(),
            None if labels is None else labels.reshape(-1).contiguous(),
            None if soft_mask is None else soft_mask.reshape(-1).contiguous(),
            resolve_normalizer("soft_normalizer", soft_normalizer, projections.student_hidden, soft_mask),
            resolve_normalizer("hard_normalizer", hard_normalizer, projections.student_hidden, labelled),
            soft_weight,
            hard_weight,
            temperature,
            ignore_index,
            vocab_size,
            chunk_bytes,
        )
    )


def check_frozen(projections: Projections) -> None:
    for name, part in projections._asdict().items():
        if name.startswith("teacher") and part is not None and part.requires_grad:
            raise ValueError(
                f"{name} must not require grad; call teacher.requires_grad_(False), or detach it"
            )


def check_fit(projections: Projections, same_width: bool) -> None:
    student = projections.student_hidden
    width = projections.student_weight.shape[:1]
    teacher_width = width if same_width else projections.teacher_weight.shape[:1]
    teacher_size = projections.teacher_hidden.shape[-1:]
    shapes: tuple[tuple[int, ...], ...] = (
        student.shape,
        width + student.shape[-1:],
        width,
        student.shape[:-1] + teacher_size,
        teacher_width + teacher_size,
        teacher_width,
    )
    for name, part, shape in zip(projections._fields, projections, shapes, strict=True):
        if part is None:
            continue
        if part.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, not {list(part.shape)}")
        if part.dtype != student.dtype:
            raise ValueError(
                f"{name} must have the dtype of student_hidden, {student.dtype}, not {part.dtype}"
            )
        if part.device != student.device:
            raise ValueError(
                f"{name} must be on the device of student_hidden, {student.device}, not {part.device}"
            )


class LinearDistillationLoss(WeightedLossModule):
    """``loss`` of :func:`linear_distillation_loss` as a module; each call takes the projections' weights.

    The defaults are those of Sanh et al. 2019 without the cosine term, which acts on hidden states.
    """

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        soft_mask: Tensor | None = None,
        soft_normalizer: float | Tensor | None = None,
        hard_normalizer: float | Tensor | None = None,
        vocab_size: int | None = None,
    ) -> Tensor:
        return linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight,
            temperature=self.temperature,
            soft_mask=soft_mask,
            soft_normalizer=soft_normalizer,
            hard_normalizer=hard_normalizer,
            vocab_size=vocab_size,
        ).loss


class LinearDistillationLossFunction(torch.autograd.Function):
    """Forward computes and saves the gradients; backward multiplies them by the incoming gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # [rows, student hidden size]
        student_weight: Tensor,  # [width, student hidden size]
        student_bias: Tensor | None,  # [width]
        teacher_hidden: Tensor,  # [rows, teacher hidden size]
        teacher_weight: Tensor,  # [teacher's width, teacher hidden size]
        teacher_bias: Tensor | None,  # [teacher's width]
        labels: Tensor | None,  # [rows]
        soft_mask: Tensor | None,  # [rows]
        soft_normalizer: Tensor,  # 0-dim
        hard_normalizer: Tensor,  # 0-dim
        soft_weight: float,
        hard_weight: float,
        temperature: float,
        ignore_index: int,
        vocab_size: int,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        coefficients = torch.stack(
            (soft_weight * temperature / soft_normalizer, hard_weight / hard_normalizer)
        )
        unscaled = torch.ones_like(soft_normalizer)
        if student_hidden.dtype == torch.float16:
            smallest = torch.finfo(coefficients.dtype).tiny  # both weights may be 0
            unscaled = (coefficients.abs().sum() / GRADIENT_SIZE).clamp(min=smallest)
        losses, *gradients = forward_backward(
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            labels,
            soft_mask,
            temperature,
            ignore_index,
            vocab_size,
            coefficients / unscaled,
            chunk_bytes,
            list(ctx.needs_input_grad[:3]),
        )
        ctx.save_for_backward(unscaled, *gradients)
        ctx.dtype = student_hidden.dtype
        ctx.gradients_given = False
        kl, soft_ce, hard_ce = means(losses, temperature, soft_normalizer, hard_normalizer)
        ctx.mark_non_differentiable(kl, soft_ce, hard_ce)
        return soft_weight * kl + hard_weight * hard_ce, kl, soft_ce, hard_ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Any, ...]:
        if ctx.gradients_given:
            raise RuntimeError(
                "linear_distillation_loss: the first backward has used its gradients; call it again for a second one"
            )
        ctx.gradients_given = True
        unscaled, *gradients = ctx.saved_tensors
        factor = grad_loss * unscaled
        hidden, weight, bias = (
            ops.rescale_gradient(gradient, factor).to(ctx.dtype) if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return hidden, weight, None if bias is None else bias.view(-1), *(None,) * 13
