"""Soft targets: T² KL of the teacher's and the student's distributions at temperature T (Hinton et al. 2015).

    L_ce = T^2 * mean over real tokens of KL(softmax(u / T) || softmax(z / T))

with student logits z and teacher logits u. ``fused.py`` computes it together with the hard labels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.job.arguments import setting
from distilspeed.trainer.objective.term import Logits, Needs, Shown, Term

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distilspeed.trainer.objective.outputs import Models, Outputs


class SoftRows(NamedTuple):
    """The tokens at which the soft-target loss is computed, and their number in the global batch."""

    mask: "torch.Tensor"  # bool, in the shape of the labels
    normalizer: "torch.Tensor"  # float32 []


@dataclass(frozen=True)
class SoftTargets(Term):
    """The soft-target loss; ``restrict_ce_to_mask`` limits it to masked tokens, which is a different objective."""

    name = "ce"
    shown = Shown("soft", "Soft targets", "soft targets, T² KL in nats", "#0072B2")

    temperature: float = setting(2.0, above=0, help="temperature of the soft targets")
    alpha_ce: float = setting(5.0, help="weight of the soft-target loss")
    restrict_ce_to_mask: bool = setting(False, help="soft targets on masked tokens only (another objective)")

    def refused_flag(self, objective: TrainingObjective) -> str | None:
        return "restrict_ce_to_mask" if self.restrict_ce_to_mask and objective == "causal" else None

    def needs(self, models: "Models") -> Needs:
        return Needs(Logits.LABELLED if self.restrict_ce_to_mask else Logits.EVERYWHERE)

    def rows(self, outputs: "Outputs") -> SoftRows:
        """Return the tokens at which the loss is computed."""
        if self.restrict_ce_to_mask:
            return SoftRows(outputs.is_labelled, outputs.batch.labelled_tokens)
        return SoftRows(outputs.is_real, outputs.batch.real_tokens)

    def loss(self, outputs: "Outputs", own: "nn.Module") -> "torch.Tensor":
        from distilspeed.kernels.distillation_loss import distillation_loss

        rows = self.rows(outputs)
        return distillation_loss(
            outputs.student.logits,
            outputs.teacher.logits,
            temperature=self.temperature,
            soft_mask=rows.mask,
            soft_normalizer=rows.normalizer,
            vocab_size=outputs.vocab_size,
        ).kl

    def described(self) -> str:
        tokens = "masked tokens only" if self.restrict_ce_to_mask else "all real tokens"
        return f"T² KL, temperature {self.temperature:g}, {tokens}"
