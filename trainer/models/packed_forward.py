"""A model run on packed rows, each token seeing its own document alone."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from distilspeed.trainer.data.batches import MicroBatch
from distilspeed.trainer.families.registry import family_of


class ModelOutputs(NamedTuple):
    """What the losses need of a model on packed rows."""

    logits: torch.Tensor  # [rows, length, vocabulary], or of the tokens asked for [tokens, vocabulary]
    hidden_states: torch.Tensor  # [rows, length, hidden size], of the last layer


def encode_packed(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states [rows, length, hidden size] of packed rows, no token having seen another document.

    A packed row gives the hidden states that its documents would give alone.
    """
    config, encoder = model.config, model.base_model
    family = family_of(config)
    mask = family.attention_mask(config, batch.document_ids, config._attn_implementation)
    positions = family.position_ids(config, batch.position_ids)
    return encoder(input_ids=batch.input_ids, attention_mask=mask, position_ids=positions).last_hidden_state


def forward_packed(
    model: PreTrainedModel, batch: MicroBatch, places: torch.Tensor | None = None
) -> ModelOutputs:
    """Run a masked language model on packed rows; see :func:`encode_packed`.

    Args:
        places: int64 [tokens], where in the flattened rows logits are wanted; None: everywhere.
    """
    hidden_states = encode_packed(model, batch)
    scored = hidden_states if places is None else hidden_states.flatten(0, 1)[places]
    return ModelOutputs(family_of(model.config).head(model, scored), hidden_states)
