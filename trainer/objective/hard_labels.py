"""Hard labels: mean over labelled tokens of -log softmax(z)[label], with student logits z.

The labels are the masked tokens or the next tokens (``masked_lm.py``, ``causal_lm.py``). With a teacher, ``fused.py``
computes the loss together with the soft targets.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distilspeed.trainer.objective.term import Term

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distilspeed.trainer.objective.outputs import Outputs


@dataclass(frozen=True)
class HardLabels(Term):
    """The cross-entropy of the labelled tokens, at temperature 1."""

    needs_teacher = False

    def loss(self, outputs: "Outputs", own: "nn.Module") -> "torch.Tensor":
        import torch

        from distilspeed.kernels.distillation_loss import distillation_loss

        logits, labels = outputs.student.logits, outputs.labels
        # No row is soft, so the second logits are not read.
        losses = distillation_loss(
            logits,
            logits.detach(),
            labels,
            soft_mask=torch.zeros_like(labels, dtype=torch.bool),
            soft_normalizer=1,
            hard_normalizer=outputs.batch.labelled_tokens,
            vocab_size=outputs.vocab_size,
        )
        return losses.hard_ce
