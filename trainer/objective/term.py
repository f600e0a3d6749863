"""The protocol of a loss: the methods that the trainer calls on each term of the objective.

A term is a frozen dataclass whose fields are its flags. Command line, metrics, model card, plot and the run's identity
follow from the list ``registry.TERMS``. This module and the terms have only fast imports, because parsers are made
from the terms; a term imports torch inside the functions that compute.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.arguments import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distilspeed.trainer.objective.outputs import Models, Outputs


class Logits(IntEnum):
    """The tokens at which a term reads both models' logits; a larger value includes the smaller ones."""

    NOWHERE = 0
    LABELLED = 1
    EVERYWHERE = 2


class Needs(NamedTuple):
    """The outputs of the two models that a term reads, apart from the last hidden states, which every term gets.

    Layers are numbered as in transformers: 0 is the output of the embeddings, n that of the n-th layer.
    """

    logits: Logits = Logits.NOWHERE
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shown:
    """How a term is shown in the model card and loss.png."""

    short: str  # name of its value in the model card
    card: str  # name of its row in the model card
    panel: str  # title of its panel in loss.png, with the unit
    colour: str  # colour of its curve in loss.png


@dataclass(frozen=True)
class Term(Settings, ABC):
    """One loss of the objective.

    A subclass is a frozen dataclass. Each field is a flag, made by ``job/arguments.py``'s ``setting`` with default,
    help and limits; the field ``alpha_NAME`` is the weight. Values are numbers, strings and booleans. A term whose
    default weight is 0 is optional: with weight 0 it is neither computed nor logged.

    Attributes:
        name: NAME in the flag ``alpha_NAME`` and the metric ``loss_NAME``.
        objective: the training objective that the term is for, or None for any. Terms for the other objective take no
            part in a run, and their flags are refused.
        needs_teacher: if true, the term is not computed without a teacher.
    """

    name: ClassVar[str]
    shown: ClassVar[Shown]
    objective: ClassVar[TrainingObjective | None] = None
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: a setting is not finite or outside its limits, or the weight is negative.
        """
        super().__post_init__()
        if self.weight < 0:
            raise UserError("bad-argument", f"--{self.weight_flag} must be at least 0")

    @abstractmethod
    def needs(self, models: "Models") -> Needs:
        """Return the logits and layers that the term reads."""

    def refusal(self, models: "Models") -> str | None:
        """Return why the term cannot be computed for these two models ("the student …"), or None if it can.

        Not called without a teacher if the term needs one.
        """
        return None

    def own_parameters(self, models: "Models") -> "nn.Module":
        """Return a module with the term's own parameters: trained and saved with the student, but not exported."""
        from torch import nn

        return nn.Identity()  # has no parameters

    @abstractmethod
    def loss(self, outputs: "Outputs", own: "nn.Module") -> "torch.Tensor":
        """Return a micro-batch's share of the term's mean over the global batch; float32 scalar, without the weight.

        Args:
            own: the module that :meth:`own_parameters` returned.
        """

    @abstractmethod
    def described(self) -> str:
        """Describe what the weight multiplies, for the model card."""

    def refused_flag(self, objective: TrainingObjective) -> str | None:
        """Return the name of a flag that is set but does not apply to the run's objective, or None."""
        return None

    @property
    def weight_flag(self) -> str:
        return f"alpha_{self.name}"

    @property
    def weight(self) -> float:
        return getattr(self, self.weight_flag)

    @property
    def is_optional(self) -> bool:
        return type(self)().weight == 0

    @property
    def takes_part(self) -> bool:
        """Whether the run asks for the term: a term that is not optional is logged even with weight 0."""
        return self.weight > 0 or not self.is_optional

    def identity(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed.

        These are all settings, but the weight only of an optional term: ``Objective.identity`` adds the others.
        """
        settings = asdict(self)
        if not self.is_optional:
            del settings[self.weight_flag]
        return settings
