"""Masked language modelling: L_mlm = mean over masked tokens of -log softmax(z)[label], with student logits z."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distilspeed.trainer.job.arguments import setting
from distilspeed.trainer.objective.hard_labels import HardLabels
from distilspeed.trainer.objective.term import Logits, Needs, Shown

if TYPE_CHECKING:
    from distilspeed.trainer.objective.outputs import Models


@dataclass(frozen=True)
class MaskedLM(HardLabels):
    name = "mlm"
    shown = Shown("MLM", "Masked language modelling", "MLM, cross-entropy in nats", "#D55E00")
    objective = "masked"

    alpha_mlm: float = setting(2.0, help="weight of the masked-language-modelling loss")

    def needs(self, models: "Models") -> Needs:
        return Needs(Logits.LABELLED)

    def described(self) -> str:
        return "cross-entropy of the masked tokens"
