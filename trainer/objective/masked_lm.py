"""Masked language modelling: L_mlm = mean over masked tokens of -log softmax(z)[label], with student logits z.

With a teacher, ``fused.py`` computes it together with the soft targets.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distilspeed.trainer.job.arguments import setting
from distilspeed.trainer.objective.term import Logits, Needs, Shown, Term

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distilspeed.trainer.objective.outputs import Models, Outputs


@dataclass(frozen=True)
class MaskedLM(Term):
    name = "mlm"
    shown = Shown("MLM", "Masked language modelling", "MLM, cross-entropy in nats", "#D55E00")
    needs_teacher = False

    alpha_mlm: float = setting(2.0, help="weight of the masked-language-modelling loss")

    def needs(self, models: "Models") -> Needs:
        return Needs(Logits.LABELLED)

    def loss(self, outputs: "Outputs", own: "nn.Module") -> "torch.Tensor":
        from torch.nn import functional

        from distilspeed.trainer.data.masking import IGNORE_INDEX

        logits = outputs.student.logits[..., : outputs.vocab_size].flatten(0, -2)
        labels = outputs.labels.flatten()
        total = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / outputs.batch.labelled_tokens

    def described(self) -> str:
        return "cross-entropy of the masked tokens"
