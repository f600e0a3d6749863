"""``launch/train.py`` with a fourth loss, which has its own parameters: a class and an entry in the registry."""

import runpy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distilspeed.trainer.job.arguments import setting
from distilspeed.trainer.objective.outputs import Models, Outputs
from distilspeed.trainer.objective.registry import TERMS
from distilspeed.trainer.objective.term import Needs, Shown, Term


@dataclass(frozen=True)
class MiddleLayers(Term):
    """Squared error between the student's first layer, through a projection, and the teacher layer it started from."""

    name = "middle"
    shown = Shown("middle", "First layers", "first layers, squared error", "#CC79A7")

    alpha_middle: float = setting(0.0, help="weight of the first layers' squared error")

    def needs(self, models: Models) -> Needs:
        return Needs(student_layers=(1,), teacher_layers=(models.layers[0] + 1,))

    def refusal(self, models: Models) -> str | None:
        return None if models.layers else "the student does not start from the teacher's layers"

    def own_parameters(self, models: Models) -> nn.Module:
        assert models.teacher
        return nn.Linear(models.student.hidden_size, models.teacher.hidden_size)

    def loss(self, outputs: Outputs, own: nn.Module) -> torch.Tensor:
        student = own(outputs.student.layers[1])
        teacher = outputs.teacher.layers[outputs.models.layers[0] + 1]
        of_tokens = (student.float() - teacher.float()).square().mean(-1)
        return of_tokens[outputs.is_real].sum() / outputs.batch.real_tokens

    def described(self) -> str:
        return "squared error, through a projection"


if __name__ == "__main__":
    TERMS.append(MiddleLayers)
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
