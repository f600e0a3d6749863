"""Models with more rows of embeddings and logits than their tokenizer has tokens."""

import copy

import torch
from transformers import PreTrainedModel

# Large, so that these columns would be nearly all of any softmax, and every prediction.
GARBAGE = 50.0


@torch.no_grad()
def with_rows(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """Return a copy of a masked language model with more rows; the additional rows hold garbage."""
    wider = copy.deepcopy(model)
    tokens = wider.config.vocab_size
    wider.resize_token_embeddings(rows, mean_resizing=False)
    wider.get_input_embeddings().weight[tokens:] = GARBAGE
    wider.get_output_embeddings().bias[tokens:] = GARBAGE
    assert wider.config.vocab_size == len(wider.get_output_embeddings().bias) == rows
    return wider
