"""Architectures the trainer distils: how a student's config and weights follow from its teacher's.

One family today: BERT -> DistilBERT. DistilBERT is BERT without token-type embeddings and pooler.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from distilspeed.trainer.errors import UserError

# Tensor cores need rows of a multiple of 8 numbers in half precision and work best on 64: 30522 is neither.
VOCABULARY_MULTIPLE = 64

# DistilBERT's layer norms have this epsilon in code, not in their config.
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

# Weights of the MLM head that a tied model shares with its word embeddings, or that share its one bias.
TIED_WEIGHTS = frozenset(
    {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.predictions.bias",
        "vocab_projector.weight",
    }
)


def check_teacher_config(config: PreTrainedConfig) -> BertConfig:
    """Return the config if its model can be distilled.

    Raises:
        UserError: the architecture is not BERT, or DistilBERT has no counterpart for one of its settings.
    """
    if not isinstance(config, BertConfig):
        raise UserError(
            f'the teacher is a "{config.model_type}" model; distilspeed distils "bert" models (BERT -> DistilBERT)'
        )
    without_counterpart = [
        (config.is_decoder, "is_decoder"),
        (config.layer_norm_eps != DISTILBERT_LAYER_NORM_EPS, f"layer_norm_eps {config.layer_norm_eps}"),
        (
            getattr(config, "position_embedding_type", "absolute") != "absolute",
            "relative position embeddings",
        ),
    ]
    for present, setting in without_counterpart:
        if present:
            raise UserError(f"the teacher has {setting}, which DistilBERT does not; choose another teacher")
    return config


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the vocabulary projection is the word embeddings, whatever the config says."""
    embeddings, projection = model.get_input_embeddings(), model.get_output_embeddings()
    return projection.weight is embeddings.weight


def student_config(teacher: BertConfig, num_layers: int) -> DistilBertConfig:
    """The DistilBERT config with the teacher's sizes and ``num_layers`` layers."""
    return DistilBertConfig(
        vocab_size=teacher.vocab_size,
        max_position_embeddings=teacher.max_position_embeddings,
        n_layers=num_layers,
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


def student_state_dict(teacher: BertForMaskedLM, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The student's weights: the teacher's embeddings, chosen layers and MLM head, under DistilBERT's names.

    BERT adds row 0 of the token-type embeddings to every token of a single-segment input. That row
    is folded into the position embeddings, so that the student's embedding output equals the teacher's.
    """
    source = teacher.state_dict()
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


def check_architecture(model: PreTrainedModel, name: str) -> None:
    """Raise a UserError unless the model is a masked language model that packed rows can be run through."""
    if not isinstance(model, BertForMaskedLM | DistilBertForMaskedLM):
        raise UserError(
            f'{name} is a "{model.config.model_type}" model; choose a "bert" or "distilbert" masked language model'
        )
    if isinstance(model, BertForMaskedLM) and model.config.is_decoder:
        raise UserError(f"{name} has is_decoder, its tokens see no later ones; choose an encoder")
    if model.config.num_hidden_layers < 1:
        raise UserError(
            f"{name} has {model.config.num_hidden_layers} layers; choose a model with at least one"
        )


def pad_vocabulary(model: PreTrainedModel) -> None:
    """Widen word embeddings and vocabulary projection to a multiple of 64 with zeros, in place.

    The config keeps the vocabulary's size: whoever reads logits leaves the padding out, so that it gets no gradient.
    """
    embeddings, projection = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    assert isinstance(projection, nn.Linear)
    missing = -len(embeddings.weight) % VOCABULARY_MULTIPLE
    if not missing:
        return
    was_tied = is_tied(model)
    embeddings.weight = _padded(embeddings.weight, missing)
    projection.weight = embeddings.weight if was_tied else _padded(projection.weight, missing)
    bias = projection.bias
    projection.bias = _padded(bias, missing)
    # BERT's second name for the bias; an untied model has a parameter of its own there, which nothing reads.
    if isinstance(model, BertForMaskedLM) and model.cls.predictions.bias is bias:
        model.cls.predictions.bias = projection.bias


def _padded(parameter: torch.Tensor, rows: int) -> nn.Parameter:
    zeros = parameter.new_zeros(rows, *parameter.shape[1:])
    return nn.Parameter(torch.cat([parameter.detach(), zeros]), parameter.requires_grad)


def mlm_head(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply the MLM head of BERT or DistilBERT: [..., hidden size] to logits [..., vocabulary, padded as the model]."""
    if isinstance(model, BertForMaskedLM):
        return model.cls(hidden_states)
    if isinstance(model, DistilBertForMaskedLM):
        transformed = model.activation(model.vocab_transform(hidden_states))
        return model.vocab_projector(model.vocab_layer_norm(transformed))
    raise TypeError(f"{type(model).__name__} has passed no check_architecture")
