"""Word embeddings and vocabulary projection of a language model: tying and padding."""

import torch
from torch import nn
from transformers import PreTrainedModel

# In half precision, tensor cores need a multiple of 8 and work best with 64; BERT's 30522 is a multiple of neither.
VOCABULARY_MULTIPLE = 64


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether vocabulary projection and word embeddings share one weight; ignores the config."""
    embeddings, projection = model.get_input_embeddings(), model.get_output_embeddings()
    return projection.weight is embeddings.weight


def pad_vocabulary(model: PreTrainedModel) -> None:
    """Pad word embeddings and vocabulary projection with zeros to a multiple of 64, in place.

    The config keeps the vocabulary size. Readers of the logits leave out the padding, so the padding gets no gradient.
    """
    embeddings, projection = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    assert isinstance(projection, nn.Linear)
    missing = -len(embeddings.weight) % VOCABULARY_MULTIPLE
    if not missing:
        return
    narrow = {id(weight): weight for weight in (embeddings.weight, *projection.parameters())}
    padded = {key: _padded(weight, missing) for key, weight in narrow.items()}
    # Replace a weight under every name: tied weights and the biases of some heads have two names.
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(weight) in padded:
                setattr(module, name, padded[id(weight)])


def _padded(parameter: torch.Tensor, rows: int) -> nn.Parameter:
    zeros = parameter.new_zeros(rows, *parameter.shape[1:])
    return nn.Parameter(torch.cat([parameter.detach(), zeros]), parameter.requires_grad)
