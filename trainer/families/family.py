"""The interface of an architecture that the trainer distils."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.families.masks import Documents
from distilspeed.trainer.families.shape import ModelShape


class Family(Protocol):
    """The architectures of a teacher and its student. All configs and models in the methods are of these model types.

    Attributes:
        teacher_types: transformers model types (``config.model_type``) that can be distilled.
        student_types: model types of the students. Models of teacher and student types can be run.
        objective: "masked" if the models predict masked tokens, "causal" if they predict the next token. It decides
            which corpora, losses and measures of quality go with the models.
        model_class: transformers Auto class of the objective, AutoModelForMaskedLM or AutoModelForCausalLM.
    """

    teacher_types: tuple[str, ...]
    student_types: tuple[str, ...]
    objective: TrainingObjective
    model_class: Any

    def refusal(self, config: PreTrainedConfig) -> str | None:
        """Return why a model cannot be run on packed rows ("has …; choose …"), or None if it can."""
        ...

    def teacher_refusal(self, teacher: PreTrainedConfig) -> str | None:
        """Return why a model that can be run cannot be distilled, or None if it can."""
        ...

    def default_layers(self, teacher: PreTrainedConfig) -> tuple[int, ...]:
        """Return the teacher's layers that a student starts from unless the user chooses others: half of them."""
        ...

    def shape(self, config: PreTrainedConfig) -> ModelShape: ...

    def attention_dropout(self, config: PreTrainedConfig) -> float: ...

    def student_config(self, teacher: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
        """Return the config of the student that starts from these layers of the teacher."""
        ...

    def student_weights(self, teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return all weights of that student under its own names: the teacher's embeddings, layers and head."""
        ...

    def position_ids(self, config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
        """Convert positions within documents (int64 [rows, length], from 0) to the model's position ids."""
        ...

    def attention_mask(
        self, config: PreTrainedConfig, documents: Documents, implementation: str | None
    ) -> Any:
        """Return the ``attention_mask`` that keeps documents from seeing each other.

        Args:
            implementation: transformers' name of the attention implementation.
        """
        ...

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the Transformer layers, which are compiled one by one."""
        ...

    def first_attention(self, model: PreTrainedModel) -> nn.Module:
        """Return the first layer's attention with its input projections.

        It is called as ``attention(hidden_states, attention_mask=mask)[0]``.
        """
        ...

    def head(self, model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits [..., vocabulary, padded as in the model] from last hidden states [..., hidden size]."""
        ...
