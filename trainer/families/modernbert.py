"""ModernBERT, mmBERT and Ettin's encoders: rotary positions, attention alternately global and within a window.

The student is a ModernBERT with fewer layers.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families.layers import half_in_order_of_types, keep_layers
from distilspeed.trainer.families.masks import Documents, document_mask
from distilspeed.trainer.families.shape import ModelShape

GLOBAL, SLIDING = "full_attention", "sliding_attention"
# transformers' rotary positions whose frequencies depend on the longest document of a batch.
ROPE_OF_THE_BATCH = ("dynamic", "longrope")


class ModernBertFamily:
    teacher_types: tuple[str, ...] = ("modernbert",)
    student_types: tuple[str, ...] = teacher_types
    objective: TrainingObjective = "masked"
    model_class = AutoModelForMaskedLM

    def refusal(self, config: PreTrainedConfig) -> str | None:
        unknown = sorted(set(config.layer_types) - {GLOBAL, SLIDING})
        if unknown:
            return f'has layer_types "{unknown[0]}"; choose a model with "{GLOBAL}" and "{SLIDING}" only'
        for rope_type in (config.rope_parameters[kind]["rope_type"] for kind in (GLOBAL, SLIDING)):
            if rope_type in ROPE_OF_THE_BATCH:
                return f'has rope_type "{rope_type}", which mixes documents of a batch; choose another model'
        return None

    def teacher_refusal(self, teacher: PreTrainedConfig) -> str | None:
        return None

    def default_layers(self, teacher: PreTrainedConfig) -> tuple[int, ...]:
        return half_in_order_of_types(teacher.layer_types)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        return ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings,
            heads=config.num_attention_heads,
            is_gated=True,
            is_rotary=True,
        )

    def attention_dropout(self, config: PreTrainedConfig) -> float:
        return float(config.attention_dropout)

    def student_config(self, teacher: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
        """Return the config of the student, with the types of its layers.

        Raises:
            UserError: the student's first layer is not the teacher's, the only one without a norm before attention.
        """
        if layers[0] != 0:
            raise UserError(
                "bad-argument",
                f"--student_layers {','.join(map(str, layers))} has no layer 0, the only one of ModernBERT without a "
                "norm before attention; start with 0",
            )
        student = copy.deepcopy(teacher)
        student.num_hidden_layers = len(layers)
        student.layer_types = [teacher.layer_types[layer] for layer in layers]
        return student

    def student_weights(self, teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        return keep_layers(teacher.state_dict(), "model.layers.", layers)

    def position_ids(self, config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids

    def attention_mask(
        self, config: PreTrainedConfig, documents: Documents, implementation: str | None
    ) -> dict[str, Any]:
        windows = {GLOBAL: None, SLIDING: config.sliding_window}
        return {
            kind: document_mask(documents, implementation, windows[kind]) for kind in set(config.layer_types)
        }

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        encoder: Any = model.base_model
        return encoder.layers

    def first_attention(self, model: PreTrainedModel) -> nn.Module:
        return _OneAttention(model)

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return model.decoder(model.head(hidden_states))


class _OneAttention(nn.Module):
    """The first attention of the type that most layers have, called with hidden states and the masks of all types."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        types = model.config.layer_types
        self.kind = SLIDING if types.count(SLIDING) > types.count(GLOBAL) else GLOBAL
        self.attention = model.model.layers[types.index(self.kind)].attn
        self.rotary = model.model.rotary_emb

    def forward(self, hidden_states: torch.Tensor, attention_mask: dict[str, Any]) -> Any:
        # Attention depends on differences of positions, so they need not restart in each document.
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        return self.attention(
            hidden_states,
            position_embeddings=self.rotary(hidden_states, positions, self.kind),
            attention_mask=attention_mask[self.kind],
        )
