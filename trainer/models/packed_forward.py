"""Run a model on packed rows; each token sees only its own document."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.families.masks import Documents
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.models.inputs import call_options


class ModelOutputs(NamedTuple):
    """The outputs of a model on packed rows that the losses need."""

    logits: torch.Tensor  # [rows, length, vocabulary], or [tokens, vocabulary] for the requested tokens
    hidden_states: torch.Tensor  # [rows, length, hidden size], of the last layer
    layers: dict[int, torch.Tensor]  # hidden states of each requested layer; 0 is the embeddings


def documents_of(batch: MicroBatch) -> Documents:
    return Documents(batch.document_ids, batch.document_starts)


def encode_packed(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Return the last hidden states [rows, length, hidden size] of packed rows.

    They equal the hidden states of each document run alone.
    """
    return _encode(model, batch).last_hidden_state


def _encode(model: PreTrainedModel, batch: MicroBatch, **options: bool) -> Any:
    """Return the output object of transformers' encoder."""
    config, encoder = model.config, model.base_model
    family = family_of(config)
    mask = family.attention_mask(config, documents_of(batch), config._attn_implementation)
    positions = family.position_ids(config, batch.position_ids)
    return encoder(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=positions,
        **call_options(model),
        **options,
    )


def forward_packed(
    model: PreTrainedModel,
    batch: MicroBatch,
    places: torch.Tensor | None = None,
    layers: Sequence[int] = (),
) -> ModelOutputs:
    """Run a language model on packed rows; see :func:`encode_packed`.

    Args:
        places: int64 [tokens], indices into the flattened rows of the tokens to compute logits for; None for all.
        layers: layers to return hidden states of, numbered as in transformers.
    """
    encoded = _encode(model, batch, **({"output_hidden_states": True} if layers else {}))
    hidden_states = encoded.last_hidden_state
    scored = hidden_states if places is None else hidden_states.flatten(0, 1)[places]
    of_layers = {layer: encoded.hidden_states[layer] for layer in layers}
    return ModelOutputs(family_of(model.config).head(model, scored), hidden_states, of_layers)
