"""Learning a task from a fine-tuned teacher: the loss between the outputs of student and teacher."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from distilspeed.trainer.data.masking import IGNORE_INDEX

# The logit of places that are padding: their probability is 0, and its logarithm is finite.
EXCLUDED = -1e4
SPAN_OUTPUTS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class TaskTeacher:
    """A teacher that is fine-tuned on the task, and the weights of the two losses."""

    model: PreTrainedModel
    temperature: float
    alpha_ce: float
    alpha_task: float


def soft_loss(
    outputs: ModelOutput, targets: ModelOutput, batch: Mapping[str, torch.Tensor], temperature: float
) -> torch.Tensor:
    """Return the loss between a student's and a teacher's outputs on a batch; float32 scalar.

    It is T² KL of the distributions at temperature T: over the classes, averaged over examples, or over labelled tokens
    for token classification; over the places of a start and an end, averaged over both, as in the original
    run_squad_w_distillation.py but without padding. For regression it is the mean squared difference.
    """
    if SPAN_OUTPUTS[0] in outputs:
        padding = batch["attention_mask"] == 0
        return torch.stack(
            [
                _kl(
                    outputs[name].float().masked_fill(padding, EXCLUDED),
                    targets[name].float().masked_fill(padding, EXCLUDED),
                    temperature,
                )
                for name in SPAN_OUTPUTS
            ]
        ).mean()
    ours, theirs = outputs["logits"].float(), targets["logits"].float()
    if ours.shape[-1] == 1:
        return functional.mse_loss(ours, theirs)
    if ours.dim() == 3:
        labelled = batch["labels"] != IGNORE_INDEX
        ours, theirs = ours[labelled], theirs[labelled]
    return _kl(ours, theirs, temperature)


def _kl(ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T² KL(teacher || student), averaged over the rows."""
    log_q, log_p = (functional.log_softmax(logits / temperature, dim=-1) for logits in (ours, theirs))
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
