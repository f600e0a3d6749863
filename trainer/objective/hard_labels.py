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
        from torch.nn import functional

        from distilspeed.trainer.data.masking import IGNORE_INDEX

        logits = outputs.student.logits[..., : outputs.vocab_size].flatten(0, -2)
        labels = outputs.labels.flatten()
        total = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / outputs.batch.labelled_tokens
