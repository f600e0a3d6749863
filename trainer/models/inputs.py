"""The inputs of a model."""

import inspect
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilspeed.trainer.families.registry import family_of

TOKENIZER_OUTPUTS = ("input_ids", "token_type_ids", "attention_mask")


def input_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a model's inputs; ``token_type_ids`` only if it has different embeddings for two segments.

    RoBERTa has one token-type embedding, and BERT may have: id 1 is out of range. GPT-2 takes token types as words.
    """
    names = list(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 0) < 2:
        return [name for name in names if name != "token_type_ids"]
    return names


def tokenizer_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Set a tokenizer to return only the inputs that a model takes, for saving with the model; return it.

    DistilBERT takes no token types. Before transformers 5 a pipeline passes everything that the tokenizer returns.
    """
    taken = input_names(model)
    names = [name for name in TOKENIZER_OUTPUTS if name in taken]
    # save_pretrained writes init_kwargs, not the attribute.
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = names
    return tokenizer


def call_options(model: PreTrainedModel) -> dict[str, Any]:
    """Return the options of a forward pass: a causal model would otherwise keep keys and values for generation."""
    return {"use_cache": False} if family_of(model.config).objective == "causal" else {}
