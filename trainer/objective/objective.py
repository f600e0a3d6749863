"""The objective: student and losses in one module that returns one scalar.

    L = alpha_ce L_ce + alpha_mlm L_mlm + alpha_cos L_cos

    L_ce   T^2 * mean over real tokens of KL(softmax(u / T) || softmax(z / T))
    L_mlm  mean over masked tokens of -log softmax(z)[label]
    L_cos  mean over real tokens of 1 - cos(h_student, h_teacher), last hidden states

with student logits z, teacher logits u, hidden states h (Sanh et al. 2019). Every mean is over the
global batch. DeepSpeed averages gradients over ranks and accumulation steps, so a micro-batch's sums
are divided by the global counts and multiplied by ranks x accumulation steps.

Where logits are wanted of masked tokens alone (no soft targets, or ``restrict_ce_to_mask``), the MLM heads of both
models see masked tokens alone. The vocabulary is that of the models' configs; projections may be padded beyond it
(families/bert.py), and padding counts for nothing.

The losses must stay inside the module that DeepSpeed wraps, and it must return this one scalar:
DeepSpeed 0.18.3 to 0.18.9 divides gradients by the accumulation steps once per output tensor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss
from distilspeed.trainer.data.batches import PADDING_DOCUMENT, MicroBatch
from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.engine.phases import LOSSES, STUDENT, phase
from distilspeed.trainer.models.packed_forward import ModelOutputs, forward_packed


@dataclass(frozen=True)
class Objective:
    """Weights of the losses, and where the soft targets count.

    ``restrict_ce_to_mask`` limits L_ce to masked tokens: another objective, not comparable with the default.
    """

    alpha_ce: float
    alpha_mlm: float
    alpha_cos: float
    temperature: float
    restrict_ce_to_mask: bool

    def scored_places(self, batch: MicroBatch) -> torch.Tensor | None:
        """Where distillation needs logits of both models: everywhere (None), or at the masked tokens."""
        return batch.masked_places if self.restrict_ce_to_mask else None


class LossParts(NamedTuple):
    """The losses of a micro-batch, float32 scalars; their sum over a global batch's micro-batches is its mean."""

    loss: torch.Tensor
    loss_ce: torch.Tensor
    loss_mlm: torch.Tensor
    loss_cos: torch.Tensor


class Distillation(nn.Module):
    """Student and objective; ``forward`` returns the scalar that DeepSpeed's backward takes.

    Args:
        student: the masked language model that is trained.
        objective: loss weights and temperature.
        world_size, accumulation_steps: over which DeepSpeed averages gradients.

    Attributes:
        last_parts: the loss parts of the last forward pass, detached, not multiplied by ranks x accumulation steps.
        last_gradient_is_finite: bool scalar on the device: of the last backward pass, where it leaves the losses and
            the MLM head for the layers.
    """

    last_parts: LossParts
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
        self.vocab_size = student.config.vocab_size
        self.world_size = world_size
        self.accumulation_steps = accumulation_steps

    def forward(
        self, batch: MicroBatch, targets: ModelOutputs | None, loss_scale: float = 1.0
    ) -> torch.Tensor:
        """Loss of one micro-batch.

        Args:
            targets: the teacher's outputs on it, with logits at ``objective.scored_places(batch)``; None without
                a teacher.
            loss_scale: of fp16, which the engine's backward multiplies by.
        """
        places = batch.masked_places if targets is None else self.objective.scored_places(batch)
        with phase(STUDENT):
            outputs = forward_packed(self.student, batch, places)
        if outputs.hidden_states.requires_grad:
            outputs.hidden_states.register_hook(self._look_at_gradient)
        with phase(LOSSES):
            if targets is None:
                parts = self.mlm_loss(outputs, batch)
            else:
                parts = self.distillation_losses(outputs, batch, targets, loss_scale)
        self.last_parts = LossParts(*(part.detach() for part in parts))
        return parts.loss * (self.world_size * self.accumulation_steps)

    def _look_at_gradient(self, gradient: torch.Tensor) -> None:
        self.last_gradient_is_finite = gradient.isfinite().all()

    def distillation_losses(
        self, outputs: ModelOutputs, batch: MicroBatch, targets: ModelOutputs, loss_scale: float
    ) -> LossParts:
        weights = self.objective
        real = batch.document_ids != PADDING_DOCUMENT
        labels, soft_mask, soft_normalizer = batch.labels, real, batch.real_tokens
        if weights.restrict_ce_to_mask:
            labels = labels.flatten()[batch.masked_places]
            soft_mask, soft_normalizer = labels != IGNORE_INDEX, batch.masked_tokens
        fused = weighted_distillation_loss(
            outputs.logits,
            targets.logits,
            labels,
            soft_weight=weights.alpha_ce,
            hard_weight=weights.alpha_mlm,
            # The engine divides by the accumulation steps, which forward has multiplied by.
            loss_scale=self.world_size * loss_scale,
            temperature=weights.temperature,
            soft_mask=soft_mask,
            soft_normalizer=soft_normalizer,
            hard_normalizer=batch.masked_tokens,
            vocab_size=self.vocab_size,
            inplace=True,
        )
        cos = cosine_loss(
            outputs.hidden_states, targets.hidden_states, mask=real, normalizer=batch.real_tokens
        )
        return LossParts(fused.loss + weights.alpha_cos * cos, fused.kl, fused.hard_ce, cos)

    def mlm_loss(self, outputs: ModelOutputs, batch: MicroBatch) -> LossParts:
        logits = outputs.logits[:, : self.vocab_size]
        labels = batch.labels.flatten()[batch.masked_places]
        total = nn.functional.cross_entropy(
            logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        mlm, zero = total / batch.masked_tokens, total.new_zeros(())
        return LossParts(self.objective.alpha_mlm * mlm, zero, mlm, zero)
