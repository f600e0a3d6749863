"""The objective: student and losses in one module that returns one scalar.

    L = alpha_ce L_ce + alpha_mlm L_mlm + alpha_cos L_cos

    L_ce   T^2 * mean over real tokens of KL(softmax(u / T) || softmax(z / T))
    L_mlm  mean over masked tokens of -log softmax(z)[label]
    L_cos  mean over real tokens of 1 - cos(h_student, h_teacher), last hidden states

with student logits z, teacher logits u, hidden states h (Sanh et al. 2019). Every mean is over the
global batch. DeepSpeed averages gradients over ranks and accumulation steps, so a micro-batch's sums
are divided by the global counts and multiplied by ranks x accumulation steps.

The losses must stay inside the module that DeepSpeed wraps, and it must return this one scalar:
DeepSpeed 0.18.3 to 0.18.9 divides gradients by the accumulation steps once per output tensor.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.distillation_loss import distillation_loss
from distilspeed.trainer.batches import PADDING_DOCUMENT, MicroBatch
from distilspeed.trainer.families import mlm_head
from distilspeed.trainer.masking import IGNORE_INDEX, MASKED_FRACTION


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


class ModelOutputs(NamedTuple):
    """What the losses need of a model on packed rows."""

    logits: torch.Tensor  # [rows, length, vocabulary]
    hidden_states: torch.Tensor  # [rows, length, hidden size], of the last layer


class LossParts(NamedTuple):
    """The losses of a micro-batch, float32 scalars; their sum over a global batch's micro-batches is its mean."""

    loss: torch.Tensor
    loss_ce: torch.Tensor
    loss_mlm: torch.Tensor
    loss_cos: torch.Tensor


def encode_packed(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states [rows, length, hidden size] of packed rows, no token having seen another document.

    A packed row gives the hidden states that its documents would give alone. Padding attends to
    padding: a row of the attention mask with nothing in it would give NaN.
    """
    same_document = batch.document_ids[:, :, None] == batch.document_ids[:, None, :]
    encoder = model.base_model
    return encoder(
        input_ids=batch.input_ids, attention_mask=same_document[:, None], position_ids=batch.position_ids
    ).last_hidden_state


def forward_packed(model: PreTrainedModel, batch: MicroBatch) -> ModelOutputs:
    """Run a masked language model on packed rows; see :func:`encode_packed`."""
    hidden_states = encode_packed(model, batch)
    return ModelOutputs(mlm_head(model, hidden_states), hidden_states)


class Distillation(nn.Module):
    """Student and objective; ``forward`` returns the scalar that DeepSpeed's backward takes.

    Args:
        student: the masked language model that is trained.
        objective: loss weights and temperature.
        gradient_shares: ranks x accumulation steps, over which DeepSpeed averages gradients.

    Attributes:
        last_parts: the loss parts of the last forward pass, detached, not multiplied by the shares.
    """

    last_parts: LossParts

    def __init__(self, student: PreTrainedModel, objective: Objective, gradient_shares: int) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.gradient_shares = gradient_shares

    def forward(self, batch: MicroBatch, targets: ModelOutputs | None) -> torch.Tensor:
        """Loss of one micro-batch; ``targets`` are the teacher's outputs on it, None without a teacher."""
        if targets is None:
            parts = self.mlm_loss(batch)
        else:
            parts = self.distillation_losses(forward_packed(self.student, batch), batch, targets)
        self.last_parts = LossParts(*(part.detach() for part in parts))
        return parts.loss * self.gradient_shares

    def distillation_losses(
        self, outputs: ModelOutputs, batch: MicroBatch, targets: ModelOutputs
    ) -> LossParts:
        weights = self.objective
        masked, real = batch.labels != IGNORE_INDEX, batch.document_ids != PADDING_DOCUMENT
        restricted = weights.restrict_ce_to_mask
        fused = distillation_loss(
            outputs.logits,
            targets.logits,
            batch.labels,
            temperature=weights.temperature,
            soft_mask=masked if restricted else real,
            soft_normalizer=batch.masked_tokens if restricted else batch.real_tokens,
            hard_normalizer=batch.masked_tokens,
        )
        cos = cosine_loss(
            outputs.hidden_states, targets.hidden_states, mask=real, normalizer=batch.real_tokens
        )
        loss = weights.alpha_ce * fused.kl + weights.alpha_mlm * fused.hard_ce + weights.alpha_cos * cos
        return LossParts(loss, fused.kl, fused.hard_ce, cos)

    def mlm_loss(self, batch: MicroBatch) -> LossParts:
        hidden_states, labels = masked_tokens(encode_packed(self.student, batch), batch.labels)
        logits = mlm_head(self.student, hidden_states).float()
        total = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        mlm, zero = total / batch.masked_tokens, total.new_zeros(())
        return LossParts(self.objective.alpha_mlm * mlm, zero, mlm, zero)


def masked_tokens(hidden_states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and labels of the masked tokens, and a few others (label -100) up to a constant number.

    The number depends on the shape alone, so that nothing waits for the device to count.

    Returns:
        [tokens, hidden size] and int64 [tokens], with tokens = rows x 15 % of the length, rounded up.
    """
    rows, length = labels.shape
    most = rows * math.ceil(MASKED_FRACTION * length)
    chosen = (labels.flatten() != IGNORE_INDEX).int().topk(most).indices
    return hidden_states.flatten(0, 1)[chosen], labels.flatten()[chosen]
