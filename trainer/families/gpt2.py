"""GPT-2, a causal language model; the student is the same architecture with fewer layers, like DistilGPT2."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.families.layers import half_of_layers, keep_layers
from distilspeed.trainer.families.masks import Documents, causal_document_mask
from distilspeed.trainer.families.shape import ModelShape


class Gpt2Shape(ModelShape):
    """A GPT-2 has only the vocabulary projection as its head."""

    @property
    def _head_weights(self) -> int:
        return 0


class Gpt2Family:
    teacher_types: tuple[str, ...] = ("gpt2",)
    student_types: tuple[str, ...] = teacher_types
    objective: TrainingObjective = "causal"
    model_class = AutoModelForCausalLM

    def refusal(self, config: PreTrainedConfig) -> str | None:
        if config.add_cross_attention:
            return "has add_cross_attention, for the decoder of another model; choose a GPT-2 without it"
        return None

    def teacher_refusal(self, teacher: PreTrainedConfig) -> str | None:
        if teacher.scale_attn_by_inverse_layer_idx:
            return (
                "has scale_attn_by_inverse_layer_idx, so a layer computes something else at another depth; "
                "choose another teacher"
            )
        return None

    def default_layers(self, teacher: PreTrainedConfig) -> tuple[int, ...]:
        return half_of_layers(teacher.num_hidden_layers)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        return Gpt2Shape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size if config.n_inner is None else config.n_inner,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings,
            heads=config.num_attention_heads,
            is_gelu_new=config.activation_function == "gelu_new",
        )

    def attention_dropout(self, config: PreTrainedConfig) -> float:
        return float(config.attn_pdrop)

    def student_config(self, teacher: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
        student = copy.deepcopy(teacher)
        student.num_hidden_layers = len(layers)
        return student

    def student_weights(self, teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        return keep_layers(teacher.state_dict(), "transformer.h.", layers)

    def position_ids(self, config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids

    def attention_mask(
        self, config: PreTrainedConfig, documents: Documents, implementation: str | None
    ) -> Any:
        return causal_document_mask(documents, implementation)

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        decoder: Any = model.base_model
        return decoder.h

    def first_attention(self, model: PreTrainedModel) -> nn.Module:
        layer: Any = self.layers(model)[0]
        return layer.attn

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return model.lm_head(hidden_states)
