"""RoBERTa, XLM-RoBERTa and CamemBERT; the student is the same architecture with fewer layers, like DistilRoBERTa."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.families.layers import half_of_layers, keep_layers
from distilspeed.trainer.families.masks import Documents, document_mask
from distilspeed.trainer.families.shape import ModelShape


class RobertaFamily:
    teacher_types: tuple[str, ...] = ("roberta", "xlm-roberta", "camembert")
    student_types: tuple[str, ...] = teacher_types
    objective: TrainingObjective = "masked"
    model_class = AutoModelForMaskedLM

    def refusal(self, config: PreTrainedConfig) -> str | None:
        if getattr(config, "is_decoder", False):
            return "has is_decoder, so its tokens do not see later tokens; choose an encoder"
        if config.pad_token_id is None:
            return "has no pad_token_id in its config.json, after which its positions start; add it"
        return None

    def teacher_refusal(self, teacher: PreTrainedConfig) -> str | None:
        return None

    def default_layers(self, teacher: PreTrainedConfig) -> tuple[int, ...]:
        return half_of_layers(teacher.num_hidden_layers)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        return ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings - _first_position(config),
            heads=config.num_attention_heads,
        )

    def attention_dropout(self, config: PreTrainedConfig) -> float:
        return float(config.attention_probs_dropout_prob)

    def student_config(self, teacher: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
        student = copy.deepcopy(teacher)
        student.num_hidden_layers = len(layers)
        return student

    def student_weights(self, teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        return keep_layers(teacher.state_dict(), "roberta.encoder.layer.", layers)

    def position_ids(self, config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids + _first_position(config)

    def attention_mask(
        self, config: PreTrainedConfig, documents: Documents, implementation: str | None
    ) -> Any:
        return document_mask(documents, implementation)

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        encoder: Any = model.base_model
        return encoder.encoder.layer

    def first_attention(self, model: PreTrainedModel) -> nn.Module:
        layer: Any = self.layers(model)[0]
        return layer.attention.self

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return model.lm_head(hidden_states)


def _first_position(config: PreTrainedConfig) -> int:
    """Return the position of a document's first token: fairseq counts from behind the padding index."""
    return config.pad_token_id + 1
