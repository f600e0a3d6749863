"""Peers of the kernels: the original recipe in eager PyTorch, Liger, NeMo Automodel, bare matrix products.

The losses are those of Sanh et al. 2019, arXiv 1910.01108, section 3, with their weights; rows are tokens.
The docstring of a peer says if it computes something else.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from distilspeed.kernels.implementation.backend import use_triton

EAGER, COMPILE, LIGER, NEMO = (frozenset({name}) for name in ("eager", "compile", "liger", "nemo"))
PEERS = EAGER | COMPILE | LIGER | NEMO

SOFT_WEIGHT = 5.0
HARD_WEIGHT = 2.0
IGNORE_INDEX = -100

# Cached, and called only for measured cases: torch.compile imports the compiler, which takes seconds.
compile_once = functools.cache(torch.compile)


def eager_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Return 5 T^2 KL(teacher || student) over all rows + 2 cross-entropy over the labelled rows, a scalar.

    Logits are [rows, vocabulary], labels [rows] int64.
    """
    soft = soft_loss(student_logits, teacher_logits, temperature)
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard_loss(student_logits, labels)


def distilbert_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, attention_mask: Tensor, temperature: float
) -> Tensor:
    """Return :func:`eager_losses` as the original training code computes it: masked_select of the soft rows' logits.

    attention_mask  [rows] bool, the rows of the soft term
    """
    student_rows = select_rows(student_logits, attention_mask)
    teacher_rows = select_rows(teacher_logits, attention_mask)
    soft = soft_loss(student_rows, teacher_rows, temperature)
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard_loss(student_logits, labels)


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    log_q = functional.log_softmax(student_logits / temperature, dim=-1)
    p = functional.softmax(teacher_logits / temperature, dim=-1)
    return functional.kl_div(log_q, p, reduction="batchmean") * temperature**2


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def eager_cosine(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Return the mean of 1 - cos over the rows of two [rows, hidden] tensors, a scalar."""
    same_direction = student_hidden.new_ones(student_hidden.shape[0])
    return functional.cosine_embedding_loss(student_hidden, teacher_hidden, same_direction)


def distilbert_cosine(student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return :func:`eager_cosine` over the rows of a [rows] bool mask, as the original training code computes it."""
    return eager_cosine(
        select_rows(student_hidden, attention_mask), select_rows(teacher_hidden, attention_mask)
    )


def select_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Return [selected rows, width] of [rows, width], selected by a mask as large as ``values``."""
    return torch.masked_select(values, mask.unsqueeze(-1).expand_as(values)).view(-1, values.shape[-1])


def liger_logits(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Return the sum of :func:`eager_losses`, from Liger's KL divergence and cross-entropy kernels; Triton only.

    The cross-entropy writes the gradient over ``student_logits``, which must not be a leaf.
    """
    if not use_triton(student_logits):
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    log_q = functional.log_softmax(student_logits / temperature, dim=-1)
    p = functional.softmax(teacher_logits / temperature, dim=-1)
    soft: Tensor = LigerKLDivLossFunction.apply(log_q, p, "batchmean") * temperature**2
    hard, *_ = LigerCrossEntropyFunction.apply(student_logits, labels, None, IGNORE_INDEX)
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard


def nemo_logits(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return :func:`eager_losses` from NeMo Automodel's soft cross-entropy kernel and PyTorch's; Triton only.

    It is larger by the teacher's entropy, which has no gradient. The kernel takes the teacher's probabilities, knows no
    temperature, and writes its gradient over its input, here a scaled copy of the logits.
    """
    if not use_triton(student_logits):
        raise RuntimeError("NeMo Automodel's kernel needs a GPU")
    from nemo_automodel.components.loss.triton.soft_cross_entropy import fused_soft_cross_entropy

    scaled = (student_logits / temperature)[None]  # it wants [batch, length, vocabulary]
    p = functional.softmax(teacher_logits / temperature, dim=-1)[None]
    every_row = p.new_ones(*p.shape[:2], 1)
    soft: Tensor = fused_soft_cross_entropy(scaled, p, every_row) * temperature**2
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard_loss(student_logits, labels)


def liger_linear(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    temperature: float,
    compiled: bool,
) -> Tensor:
    """Return Liger's fused linear distillation loss, the Liger loss nearest to ours; PyTorch, any device.

    Its generalised Jensen-Shannon divergence with beta 0 is KL(teacher || student); T^2 is part of its weight.
    It computes the divergence in all rows, like the other cases, but divides by the number of labelled rows.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_soft_loss=SOFT_WEIGHT * temperature**2,
        weight_hard_loss=HARD_WEIGHT,
        beta=0.0,
        ignore_index=IGNORE_INDEX,
        temperature=temperature,
        compiled=compiled,
    )
    value: Tensor = loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    return value


def project_both(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the whole logits of student and teacher: [rows, hidden] x [vocabulary, hidden] -> [rows, vocabulary]."""
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.T
    return student_hidden @ student_weight.T, teacher_logits


def project_back(
    student_hidden: Tensor, student_weight: Tensor, logits_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's hidden states and weight, from that of its logits."""
    return logits_gradient @ student_weight, logits_gradient.T @ student_hidden
