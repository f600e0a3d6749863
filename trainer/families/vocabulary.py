"""The two ends of a language model where its vocabulary is: word embeddings and vocabulary projection."""

import torch
from torch import nn
from transformers import PreTrainedModel

# Tensor cores need rows of a multiple of 8 numbers in half precision and work best on 64: 30522 is neither.
VOCABULARY_MULTIPLE = 64


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the vocabulary projection is the word embeddings, whatever the config says."""
    embeddings, projection = model.get_input_embeddings(), model.get_output_embeddings()
    return projection.weight is embeddings.weight


def pad_vocabulary(model: PreTrainedModel) -> None:
    """Widen word embeddings and vocabulary projection to a multiple of 64 with zeros, in place.

    The config keeps the vocabulary's size: whoever reads logits leaves the padding out, so that it gets no gradient.
    """
    embeddings, projection = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    assert isinstance(projection, nn.Linear)
    missing = -len(embeddings.weight) % VOCABULARY_MULTIPLE
    if not missing:
        return
    narrow = {id(weight): weight for weight in (embeddings.weight, *projection.parameters())}
    padded = {key: _padded(weight, missing) for key, weight in narrow.items()}
    # Under every name: tied weights have two, and so has the bias of some heads.
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(weight) in padded:
                setattr(module, name, padded[id(weight)])


def _padded(parameter: torch.Tensor, rows: int) -> nn.Parameter:
    zeros = parameter.new_zeros(rows, *parameter.shape[1:])
    return nn.Parameter(torch.cat([parameter.detach(), zeros]), parameter.requires_grad)
