"""The objective: student and losses in one module that returns one scalar.

    L = sum over terms of weight * loss          (registry.py lists the terms)

Every mean is over the global batch. DeepSpeed averages gradients over ranks and accumulation steps, so a
micro-batch's sums are divided by the global counts and multiplied by ranks x accumulation steps.

If the terms read only logits of masked tokens, the MLM heads of both models run only on masked tokens. The vocabulary
size is the length of the corpus's tokenizer. Either model may have more rows, and projections are padded further
(families/vocabulary.py); the losses ignore the padding.

The losses must stay inside the module that DeepSpeed wraps, and the module must return one scalar: DeepSpeed 0.18.3
to 0.18.9 divides gradients by the accumulation steps once per output tensor.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.data.masking import MASKED_FRACTION
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.engine.phases import LOSSES, STUDENT, phase
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.models.packed_forward import ModelOutputs, forward_packed
from distilspeed.trainer.objective.fused import fused_losses, fused_terms
from distilspeed.trainer.objective.outputs import Models, Outputs
from distilspeed.trainer.objective.registry import check_terms
from distilspeed.trainer.objective.term import Logits, Needs, Term


@dataclass(frozen=True)
class Objective:
    """The registered terms with a run's settings, and what they need of the two models together.

    Attributes:
        registered: all terms, in the registry's order.
    """

    registered: tuple[Term, ...]
    models: Models

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The terms that take part; the run logs their values."""
        return tuple(term for term in self.registered if term.takes_part and term.name not in self.refusals)

    @cached_property
    def refusals(self) -> dict[str, str]:
        """Why terms cannot be computed for the run's two models, by their names."""
        asked = (term for term in self.registered if self.models.teacher or not term.needs_teacher)
        reasons = {term.name: term.refusal(self.models) for term in asked if term.takes_part}
        return {name: reason for name, reason in reasons.items() if reason}

    @cached_property
    def computed(self) -> tuple[Term, ...]:
        """The ``terms`` that are computed; without a teacher, terms that need one have the value 0."""
        return tuple(term for term in self.terms if self.models.teacher or not term.needs_teacher)

    @cached_property
    def trained(self) -> tuple[Term, ...]:
        """The ``computed`` terms with a weight above 0."""
        return tuple(term for term in self.computed if term.weight)

    @cached_property
    def needs(self) -> Needs:
        """The logits and layers that the terms read of the two models."""
        needs = [term.needs(self.models) for term in self.computed]
        return Needs(
            max(of.logits for of in needs),
            _union(of.student_layers for of in needs),
            _union(of.teacher_layers for of in needs),
        )

    @property
    def head_share(self) -> float:
        """The fraction of tokens that pass through the MLM heads."""
        return 1.0 if self.needs.logits is Logits.EVERYWHERE else MASKED_FRACTION

    def places(self, batch: MicroBatch) -> torch.Tensor | None:
        """Return where the logits of both models are needed: None for all tokens, or the places of masked tokens."""
        return None if self.needs.logits is Logits.EVERYWHERE else batch.masked_places

    def check(self, given: Collection[str] = ()) -> None:
        """Check that the chosen terms can be computed for the two models; default terms that cannot take no part.

        Args:
            given: the flags on the command line. A term is chosen if its weight is among them, or not the default.

        Raises:
            UserError: a chosen term with a weight cannot be computed, or no term with a weight is left.
        """
        for term in self.registered:
            is_chosen = term.weight_flag in given or term.weight != type(term)().weight
            if term.weight and is_chosen and term.name in self.refusals:
                raise UserError(
                    "conflicting-arguments",
                    f"--{term.weight_flag} {term.weight:g} cannot be used, because {self.refusals[term.name]}; "
                    "omit it, or choose another student",
                )
        check_terms(self.terms, self.models.teacher is not None)

    def settings(self) -> dict[str, Any]:
        """Return every setting of every registered term, by its flag."""
        return {name: value for term in self.registered for name, value in asdict(term).items()}

    def identity(self) -> dict[str, Any]:
        """Return the terms' settings that must not change when a run is resumed.

        An optional term that takes no part adds nothing, so registering a new term does not affect earlier runs.
        """
        identity: dict[str, Any] = {"alphas": [term.weight for term in self.terms if not term.is_optional]}
        for term in self.terms:
            identity |= term.identity()
        return identity


def _union(layers: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({layer for of_term in layers for layer in of_term}))


class Distillation(nn.Module):
    """Student and objective in one module; ``forward`` returns the scalar for DeepSpeed's backward pass.

    Args:
        student: the masked language model to train.
        objective: the terms.
        world_size, accumulation_steps: the numbers over which DeepSpeed averages gradients.

    Attributes:
        own: the terms' own parameters, by the terms' names.
        last_parts: float32 [1 + terms], detached: the loss and the value of each term in the last forward pass, not
            multiplied by ranks x accumulation steps. Summed over the micro-batches of a global batch, they give its
            means.
        last_gradient_is_finite: bool scalar on the device: whether the gradient that the last backward pass sent
            from the losses and the MLM head into the encoder's layers was finite.
    """

    last_parts: torch.Tensor
    last_gradient_is_finite: torch.Tensor

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        world_size: int,
        accumulation_steps: int,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.own = nn.ModuleDict(
            {term.name: term.own_parameters(objective.models) for term in objective.computed}
        )
        self.fused = fused_terms(objective.computed)
        self.alone = [term for term in objective.computed if not self.fused or term not in self.fused]
        self.keeps_logits = any(term.needs(objective.models).logits for term in self.alone)
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps

    def forward(
        self, batch: MicroBatch, targets: ModelOutputs | None, loss_scale: float = 1.0
    ) -> torch.Tensor:
        """Return the loss of one micro-batch, multiplied by ranks x accumulation steps.

        Args:
            targets: the teacher's outputs on the micro-batch, with logits at ``objective.places(batch)`` and the
                layers of ``objective.needs``; None without a teacher.
            loss_scale: the fp16 loss scale, by which the engine's backward pass multiplies.
        """
        places = self.objective.places(batch)
        with phase(STUDENT):
            student = forward_packed(self.student, batch, places, self.objective.needs.student_layers)
        if student.hidden_states.requires_grad:
            student.hidden_states.register_hook(self._look_at_gradient)
        with phase(LOSSES):
            outputs = Outputs(batch, student, targets, places, self.objective.models)
            loss, values = self.losses(outputs, loss_scale)
        names = [term.name for term in self.objective.terms]
        parts = [values[name] if name in values else loss.new_zeros(()) for name in names]
        self.last_parts = torch.stack([part.detach() for part in (loss, *parts)])
        return loss * (self.world_size * self.accumulation_steps)

    def _look_at_gradient(self, gradient: torch.Tensor) -> None:
        self.last_gradient_is_finite = gradient.isfinite().all()

    def losses(self, outputs: Outputs, loss_scale: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the weighted sum of the computed terms, and the value of each by its name."""
        weighted: list[torch.Tensor] = []
        values: dict[str, torch.Tensor] = {}
        if self.fused:
            # The accumulation steps cancel: forward multiplies by them, and the engine divides by them.
            scale = self.world_size * loss_scale
            loss, values = fused_losses(self.fused, outputs, scale, inplace=not self.keeps_logits)
            weighted.append(loss)
        for term in self.alone:
            values[term.name] = term.loss(outputs, self.own[term.name])
            weighted.append(term.weight * values[term.name])
        return reduce(torch.add, weighted), values
