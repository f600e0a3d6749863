"""What a term sees of a micro-batch."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import PADDING_DOCUMENT, MicroBatch
from distilspeed.trainer.models.packed_forward import ModelOutputs


class Models(NamedTuple):
    """The two models of a run."""

    student: PreTrainedConfig
    teacher: PreTrainedConfig | None
    layers: tuple[int, ...]  # of the teacher, from which the student starts; counted from 0


@dataclass(frozen=True)
class Outputs:
    """A micro-batch and what the two models gave on it.

    Attributes:
        targets: the teacher's outputs; None without a teacher.
        places: where in the flattened rows the logits are, int64 [tokens]; None: everywhere.
    """

    batch: MicroBatch
    student: ModelOutputs
    targets: ModelOutputs | None
    places: torch.Tensor | None
    models: Models

    @property
    def teacher(self) -> ModelOutputs:
        """The teacher's outputs, for a term that needs a teacher."""
        assert self.targets is not None
        return self.targets

    @property
    def vocab_size(self) -> int:
        """Columns of the logits beyond it are padding."""
        return self.models.student.vocab_size

    @cached_property
    def labels(self) -> torch.Tensor:
        """int64, those at the places of the logits: [rows, length] or [tokens]; -100 where a token is not masked."""
        return self.batch.labels if self.places is None else self.batch.labels.flatten()[self.places]

    @cached_property
    def is_labelled(self) -> torch.Tensor:
        """bool, in the shape of the labels: the masked tokens."""
        return self.labels != IGNORE_INDEX

    @cached_property
    def is_real(self) -> torch.Tensor:
        """bool [rows, length], the tokens that are not padding."""
        return self.batch.document_ids != PADDING_DOCUMENT
