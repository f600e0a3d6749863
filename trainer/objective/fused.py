"""Soft targets and hard labels, with their gradient, in one launch.

The kernel computes the same values as the two terms separately, and can write the gradient over the student's logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss
from distilspeed.trainer.objective.hard_labels import HardLabels
from distilspeed.trainer.objective.outputs import Outputs
from distilspeed.trainer.objective.soft_targets import SoftTargets
from distilspeed.trainer.objective.term import Term


class FusedTerms(NamedTuple):
    """The two terms of one kernel call."""

    soft: SoftTargets
    hard: HardLabels


def fused_terms(terms: Sequence[Term]) -> FusedTerms | None:
    """Return the pair among ``terms``; None if one of them is missing."""
    soft = next((term for term in terms if isinstance(term, SoftTargets)), None)
    hard = next((term for term in terms if isinstance(term, HardLabels)), None)
    return FusedTerms(soft, hard) if soft and hard else None


def fused_losses(
    terms: FusedTerms, outputs: Outputs, loss_scale: float, inplace: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighted sum of the two losses, and the value of each by its name; only the sum has a gradient.

    Args:
        loss_scale: the gradient that the sum will receive in the backward pass.
        inplace: write the gradient over the student's logits; no other term may then read them.
    """
    soft, hard = terms
    rows = soft.rows(outputs)
    losses = weighted_distillation_loss(
        outputs.student.logits,
        outputs.teacher.logits,
        outputs.labels,
        soft_weight=soft.weight,
        hard_weight=hard.weight,
        loss_scale=loss_scale,
        temperature=soft.temperature,
        soft_mask=rows.mask,
        soft_normalizer=rows.normalizer,
        hard_normalizer=outputs.batch.labelled_tokens,
        vocab_size=outputs.vocab_size,
        inplace=inplace,
    )
    return losses.loss, {soft.name: losses.kl, hard.name: losses.hard_ce}
