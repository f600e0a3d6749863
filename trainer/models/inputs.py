"""The inputs of a model."""

import inspect
from typing import Any

from transformers import PreTrainedModel

from distilspeed.trainer.families.registry import family_of


def input_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's inputs; ``token_type_ids`` only if it has different embeddings for two segments.

    RoBERTa has one token-type embedding, and BERT may have: id 1 is out of range. GPT-2 takes token types as words.
    """
    names = list(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 0) < 2:
        return [name for name in names if name != "token_type_ids"]
    return names


def call_options(model: PreTrainedModel) -> dict[str, Any]:
    """Return the options of a forward pass: a causal model would otherwise keep keys and values for generation."""
    return {"use_cache": False} if family_of(model.config).objective == "causal" else {}
