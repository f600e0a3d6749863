"""The protocol of a loss: what the trainer asks of each term of the objective.

A term is a frozen dataclass whose fields are its flags. It stands in ``registry.TERMS``; command line, metrics, model
card, plot and the run's identity follow from there. Imports nothing heavy, because a parser is made from the terms:
they import torch where they compute.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.arguments import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from distilspeed.trainer.objective.outputs import Models, Outputs


class Logits(IntEnum):
    """Where a term reads logits, of both models; a larger value includes the smaller ones."""

    NOWHERE = 0
    MASKED = 1
    EVERYWHERE = 2


class Needs(NamedTuple):
    """What a term reads of the two models besides the last hidden states, which it always gets.

    Layers are numbered as in transformers: 0 is the output of the embeddings, n that of the n-th layer.
    """

    logits: Logits = Logits.NOWHERE
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shown:
    """How a term is shown in what a run leaves behind."""

    short: str  # its value in the model card
    card: str  # its row in the model card
    panel: str  # the title of its panel in loss.png, with the unit
    colour: str  # of its curve there


@dataclass(frozen=True)
class Term(Settings, ABC):
    """One loss of the objective.

    A subclass is a frozen dataclass. Each field is a flag, made by ``job/arguments.py``'s ``setting`` with default,
    help and limits; the one called ``alpha_NAME`` is the weight. Values are numbers, strings and booleans. A term whose
    default weight is 0 is optional: without a weight nothing of it is computed or written.

    Attributes:
        name: of its flag ``alpha_NAME`` and its metric ``loss_NAME``.
        needs_teacher: it is not computed where there is none.
    """

    name: ClassVar[str]
    shown: ClassVar[Shown]
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: one is not finite or not within its limits, or the weight is negative.
        """
        super().__post_init__()
        if self.weight < 0:
            raise UserError("bad-argument", f"--{self.weight_flag} must not be negative")

    @abstractmethod
    def needs(self, models: "Models") -> Needs:
        """What it reads of the models."""

    def own_parameters(self, models: "Models") -> "nn.Module":
        """A module with its own parameters: trained and saved with the student, not exported with it."""
        from torch import nn

        return nn.Identity()  # which has none

    @abstractmethod
    def loss(self, outputs: "Outputs", own: "nn.Module") -> "torch.Tensor":
        """Its share of a micro-batch in its mean over the global batch; float32 scalar, without the weight.

        Args:
            own: what :meth:`own_parameters` made.
        """

    @abstractmethod
    def described(self) -> str:
        """What the weight multiplies, for the model card."""

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
        """Whether it is computed and written: with weight 0, too, unless it is optional."""
        return self.weight > 0 or not self.is_optional

    def identity(self) -> dict[str, Any]:
        """Its settings that must not change when a run is resumed: all; ``Objective.identity`` has most weights."""
        settings = asdict(self)
        if not self.is_optional:
            del settings[self.weight_flag]
        return settings
