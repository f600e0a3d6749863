"""BERT to DistilBERT, which is BERT without token-type embeddings and pooler; DistilBERT to a smaller DistilBERT."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.families.layers import half_of_layers, keep_layers
from distilspeed.trainer.families.masks import Documents, document_mask
from distilspeed.trainer.families.shape import ModelShape

# DistilBERT has this layer-norm epsilon in its code, not in its config.
DISTILBERT_LAYER_NORM_EPS = 1e-12

# teacher name -> student name, within one Transformer layer
_LAYER_PARTS = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
_OTHER_PARTS = {
    "bert.embeddings.LayerNorm": "distilbert.embeddings.LayerNorm",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
}


class BertFamily:
    teacher_types: tuple[str, ...] = ("bert", "distilbert")
    student_types: tuple[str, ...] = ("distilbert",)
    objective: TrainingObjective = "masked"
    model_class = AutoModelForMaskedLM

    def refusal(self, config: PreTrainedConfig) -> str | None:
        if isinstance(config, BertConfig) and config.is_decoder:
            return "has is_decoder, so its tokens do not see later tokens; choose an encoder"
        return None

    def teacher_refusal(self, teacher: PreTrainedConfig) -> str | None:
        if isinstance(teacher, DistilBertConfig):
            return None
        without_counterpart = [
            (teacher.layer_norm_eps != DISTILBERT_LAYER_NORM_EPS, f"layer_norm_eps {teacher.layer_norm_eps}"),
            (
                getattr(teacher, "position_embedding_type", "absolute") != "absolute",
                "relative position embeddings",
            ),
        ]
        for present, setting in without_counterpart:
            if present:
                return f"has {setting}, which DistilBERT does not support; choose another teacher"
        return None

    def default_layers(self, teacher: PreTrainedConfig) -> tuple[int, ...]:
        return half_of_layers(teacher.num_hidden_layers)

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        return ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=(
                config.hidden_dim if isinstance(config, DistilBertConfig) else config.intermediate_size
            ),
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings,
            heads=config.num_attention_heads,
        )

    def attention_dropout(self, config: PreTrainedConfig) -> float:
        if isinstance(config, DistilBertConfig):
            return float(config.attention_dropout)
        return float(config.attention_probs_dropout_prob)

    def student_config(self, teacher: PreTrainedConfig, layers: Sequence[int]) -> DistilBertConfig:
        if isinstance(teacher, DistilBertConfig):
            student = copy.deepcopy(teacher)
            student.n_layers = len(layers)
            return student
        return DistilBertConfig(
            vocab_size=teacher.vocab_size,
            max_position_embeddings=teacher.max_position_embeddings,
            n_layers=len(layers),
            n_heads=teacher.num_attention_heads,
            dim=teacher.hidden_size,
            hidden_dim=teacher.intermediate_size,
            dropout=teacher.hidden_dropout_prob,
            attention_dropout=teacher.attention_probs_dropout_prob,
            activation=teacher.hidden_act,
            initializer_range=teacher.initializer_range,
            pad_token_id=teacher.pad_token_id,
            tie_word_embeddings=teacher.tie_word_embeddings,
        )

    def student_weights(self, teacher: PreTrainedModel, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the teacher's embeddings, chosen layers and MLM head, under DistilBERT's names.

        BERT adds row 0 of the token-type embeddings to every token of a single-segment input. This method folds that
        row into the position embeddings, so the student's embedding output equals the teacher's.
        """
        source = teacher.state_dict()
        if isinstance(teacher, DistilBertForMaskedLM):
            return keep_layers(source, "distilbert.transformer.layer.", layers)
        embeddings = "bert.embeddings"
        weights = {
            "distilbert.embeddings.word_embeddings.weight": source[f"{embeddings}.word_embeddings.weight"],
            "distilbert.embeddings.position_embeddings.weight": (
                source[f"{embeddings}.position_embeddings.weight"]
                + source[f"{embeddings}.token_type_embeddings.weight"][0]
            ),
            "vocab_projector.weight": source["cls.predictions.decoder.weight"],
            "vocab_projector.bias": source["cls.predictions.decoder.bias"],
        }
        parts = dict(_OTHER_PARTS)
        for to_layer, from_layer in enumerate(layers):
            for teacher_name, student_name in _LAYER_PARTS.items():
                parts[f"bert.encoder.layer.{from_layer}.{teacher_name}"] = (
                    f"distilbert.transformer.layer.{to_layer}.{student_name}"
                )
        for teacher_name, student_name in parts.items():
            for kind in ("weight", "bias"):
                weights[f"{student_name}.{kind}"] = source[f"{teacher_name}.{kind}"]
        return weights

    def position_ids(self, config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids

    def attention_mask(
        self, config: PreTrainedConfig, documents: Documents, implementation: str | None
    ) -> Any:
        return document_mask(documents, implementation)

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        encoder: Any = model.base_model
        return (encoder.transformer if isinstance(model, DistilBertForMaskedLM) else encoder.encoder).layer

    def first_attention(self, model: PreTrainedModel) -> nn.Module:
        attention: Any = self.layers(model)[0].attention
        return attention if isinstance(model, DistilBertForMaskedLM) else attention.self

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if isinstance(model, DistilBertForMaskedLM):
            transformed = model.activation(model.vocab_transform(hidden_states))
            return model.vocab_projector(model.vocab_layer_norm(transformed))
        return model.cls(hidden_states)
