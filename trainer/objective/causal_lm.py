"""Causal language modelling: L_clm = mean over tokens with a next token of -log softmax(z)[next token].

The last token of a document has no next token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distilspeed.trainer.job.arguments import setting
from distilspeed.trainer.objective.hard_labels import HardLabels
from distilspeed.trainer.objective.term import Logits, Needs, Shown

if TYPE_CHECKING:
    from distilspeed.trainer.objective.outputs import Models


@dataclass(frozen=True)
class CausalLM(HardLabels):
    name = "clm"
    shown = Shown("CLM", "Causal language modelling", "CLM, cross-entropy in nats", "#D55E00")
    objective = "causal"

    # The default of the original code (Sanh et al. 2019).
    alpha_clm: float = setting(0.5, help="weight of the causal-language-modelling loss, for GPT-2")

    def needs(self, models: "Models") -> Needs:
        return Needs(Logits.EVERYWHERE)

    def described(self) -> str:
        return "cross-entropy of the next tokens"
