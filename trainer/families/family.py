"""What the trainer asks of an architecture that it distils."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distilspeed.trainer.families.shape import ModelShape


class Family(Protocol):
    """A teacher's architecture and that of its student. Configs and models are those of its model types.

    Attributes:
        teacher_types: transformers' model types (``config.model_type``) that can be distilled.
        student_types: the model types that its students have; with the teachers', those that can be run.
        model_class: transformers' Auto class of the training objective: AutoModelForMaskedLM is the only one so far.
    """

    teacher_types: tuple[str, ...]
    student_types: tuple[str, ...]
    model_class: Any

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Why a model cannot be run on packed rows ("has …; choose …"); None: it can."""
        ...

    def teacher_refusal(self, teacher: PreTrainedConfig) -> str | None:
        """Why a model that can be run cannot be distilled; None: it can."""
        ...

    def shape(self, config: PreTrainedConfig) -> ModelShape: ...

    def attention_dropout(self, config: PreTrainedConfig) -> float: ...

    def student_config(self, teacher: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
        """The config of the student that starts from these layers of the teacher."""
        ...

    def student_weights(self, teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """All weights of that student, by its names: the teacher's embeddings, layers and head."""
        ...

    def position_ids(self, config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
        """The model's position ids, from positions within documents, int64 [rows, length], that start at 0."""
        ...

    def attention_mask(
        self, config: PreTrainedConfig, document_ids: torch.Tensor, implementation: str | None
    ) -> Any:
        """What the model takes as ``attention_mask`` so that documents do not see each other.

        Args:
            document_ids: int64 [rows, length], -1 on padding.
            implementation: transformers' name of the attention that takes the mask.
        """
        ...

    def first_attention(self, model: PreTrainedModel) -> nn.Module:
        """The first layer's attention, input projections included: ``(hidden_states, attention_mask=mask)[0]``."""
        ...

    def head(self, model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary, padded as the model] of last hidden states [..., hidden size]."""
        ...
