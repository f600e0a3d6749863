"""The inputs of a term: a micro-batch and the outputs of both models on it."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import PADDING_DOCUMENT, MicroBatch
from distilspeed.trainer.models.packed_forward import ModelOutputs


class Models(NamedTuple):
    """The two models of a run: their configs, and what connects them."""

    student: PreTrainedConfig
    teacher: PreTrainedConfig | None
    # the teacher's layers that the student is initialised from, counted from 0; () if it starts elsewhere
    layers: tuple[int, ...]
    vocab_size: int  # the length of the tokenizer; each model may have more rows of embeddings and logits


@dataclass(frozen=True)
class Outputs:
    """A micro-batch and the outputs of the two models on it.

    Attributes:
        targets: the teacher's outputs; None without a teacher.
        places: int64 [tokens], the indices into the flattened rows at which there are logits; None for all tokens.
    """

    batch: MicroBatch
    student: ModelOutputs
    targets: ModelOutputs | None
    places: torch.Tensor | None
    models: Models

    @property
    def teacher(self) -> ModelOutputs:
        """The teacher's outputs; only for terms that need a teacher."""
        assert self.targets is not None
        return self.targets

    @property
    def vocab_size(self) -> int:
        """The number of tokens of the tokenizer; columns of either model's logits beyond it are padding."""
        return self.models.vocab_size

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64 [rows, length] or [tokens], the labels at ``places``; -100 if a token is not masked."""
        return self.batch.labels if self.places is None else self.batch.labels.flatten()[self.places]

    @cached_property
    def is_labelled(self) -> torch.Tensor:
        """bool, in the shape of ``labels``: the masked tokens."""
        return self.labels != IGNORE_INDEX

    @cached_property
    def is_real(self) -> torch.Tensor:
        """bool [rows, length]: the tokens that are not padding."""
        return self.batch.document_ids != PADDING_DOCUMENT
