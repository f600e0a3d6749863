"""Hidden states: L_cos = mean over real tokens of 1 - cos(h_student, h_teacher), last layers (Sanh et al. 2019)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distilspeed.trainer.job.arguments import setting
from distilspeed.trainer.objective.term import Needs, Shown, Term

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distilspeed.trainer.objective.outputs import Models, Outputs


@dataclass(frozen=True)
class HiddenCosine(Term):
    name = "cos"
    shown = Shown("cosine", "Hidden states", "hidden states, 1 − cosine", "#009E73")

    alpha_cos: float = setting(1.0, help="weight of the hidden-state cosine loss")

    def needs(self, models: "Models") -> Needs:
        return Needs()

    def refusal(self, models: "Models") -> str | None:
        assert models.teacher
        student, teacher = models.student.hidden_size, models.teacher.hidden_size
        if student == teacher:
            return None
        return f"the student's hidden states have {student} numbers and the teacher's {teacher}"

    def loss(self, outputs: "Outputs", own: "nn.Module") -> "torch.Tensor":
        from distilspeed.kernels.cosine_loss import cosine_loss

        return cosine_loss(
            outputs.student.hidden_states,
            outputs.teacher.hidden_states,
            mask=outputs.is_real,
            normalizer=outputs.batch.real_tokens,
        )

    def described(self) -> str:
        return "(1 − cosine), last layer"
