"""The definitions of the losses in plain PyTorch: the oracle of the kernels' tests.

Any floating dtype; the tests use float64. Written to be read next to the formulas, not to be fast: probabilities
are materialised whole, and autograd computes the gradients. Arguments, defaults and results are those of the
functions of the same name in ``distillation_loss`` and ``cosine_loss``.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from distilspeed.kernels.distillation_loss import DistillationLosses


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
) -> DistillationLosses:
    """Return soft-target KL and cross-entropy times T^2, and hard-label cross-entropy, from [..., V] logits."""
    student_logits = student_logits[..., :vocab_size]
    teacher_logits = teacher_logits[..., :vocab_size].detach()
    soft_rows = torch.ones_like(student_logits[..., 0], dtype=torch.bool) if soft_mask is None else soft_mask
    log_q = log_softmax(student_logits[soft_rows] / temperature, dim=-1)
    log_p = log_softmax(teacher_logits[soft_rows] / temperature, dim=-1)
    p = log_p.exp()
    if soft_normalizer is None:
        soft_normalizer = soft_rows.sum().clamp(min=1)
    soft_ce = expectation(p, -log_q).sum() * temperature**2 / soft_normalizer
    kl = expectation(p, log_p - log_q).sum() * temperature**2 / soft_normalizer

    if labels is None:
        return DistillationLosses(kl, soft_ce, torch.zeros_like(kl))
    labelled = labels != ignore_index
    log_probabilities = log_softmax(student_logits[labelled], dim=-1)
    if hard_normalizer is None:
        hard_normalizer = labelled.sum().clamp(min=1)
    label_log_probabilities = log_probabilities.gather(-1, labels[labelled].unsqueeze(-1))
    return DistillationLosses(kl, soft_ce, -label_log_probabilities.sum() / hard_normalizer)


def cosine_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Return the mean over the rows of ``mask`` of 1 - cos(student, teacher), from [..., H] hidden states."""
    rows = torch.ones_like(student_hidden[..., 0], dtype=torch.bool) if mask is None else mask
    student, teacher = student_hidden[rows], teacher_hidden[rows].detach()
    student_norm = torch.linalg.vector_norm(student, dim=-1).clamp(min=eps)
    teacher_norm = torch.linalg.vector_norm(teacher, dim=-1).clamp(min=eps)
    cosine = (student * teacher).sum(-1) / (student_norm * teacher_norm)
    if normalizer is None:
        normalizer = rows.sum().clamp(min=1)
    return (1 - cosine).sum() / normalizer


def expectation(p: Tensor, values: Tensor) -> Tensor:
    """Return sum_v p_v values_v; a class of probability 0 contributes 0 even if its value is infinite or NaN."""
    return torch.where(p > 0, p * values, 0).sum(-1)
