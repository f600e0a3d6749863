"""A family for tests: BERT whose positions start at 2; the student is the same model with fewer layers.

python madeup_family.py SCRIPT ARGUMENTS      runs launch/SCRIPT with the family registered
"""

import copy
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.families.layers import half_of_layers, keep_layers
from distilspeed.trainer.families.masks import Documents, document_mask
from distilspeed.trainer.families.registry import FAMILIES
from distilspeed.trainer.families.shape import ModelShape

FIRST_POSITION = 2


class MadeUpConfig(BertConfig):
    model_type = "madeup_bert"


class MadeUpForMaskedLM(BertForMaskedLM):
    config_class = MadeUpConfig

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> Any:
        positions = FIRST_POSITION + torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, attention_mask, position_ids=positions, **inputs)


class MadeUpFamily:
    teacher_types = ("madeup_bert",)
    student_types = ("madeup_bert",)
    objective: TrainingObjective = "masked"
    model_class = AutoModelForMaskedLM

    def refusal(self, config: Any) -> str | None:
        return None

    def teacher_refusal(self, teacher: Any) -> str | None:
        return None

    def default_layers(self, teacher: Any) -> tuple[int, ...]:
        return half_of_layers(teacher.num_hidden_layers)

    def shape(self, config: Any) -> ModelShape:
        return ModelShape(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            positions=config.max_position_embeddings - FIRST_POSITION,
            heads=config.num_attention_heads,
        )

    def attention_dropout(self, config: Any) -> float:
        return float(config.attention_probs_dropout_prob)

    def student_config(self, teacher: Any, layers: Sequence[int]) -> MadeUpConfig:
        student = copy.deepcopy(teacher)
        student.num_hidden_layers = len(layers)
        return student

    def student_weights(self, teacher: Any, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        return keep_layers(teacher.state_dict(), "bert.encoder.layer.", layers)

    def position_ids(self, config: Any, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids + FIRST_POSITION

    def attention_mask(self, config: Any, documents: Documents, implementation: str | None) -> Any:
        return document_mask(documents, implementation)

    def layers(self, model: Any) -> Any:
        return model.bert.encoder.layer

    def first_attention(self, model: Any) -> nn.Module:
        return model.bert.encoder.layer[0].attention.self

    def head(self, model: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return model.cls(hidden_states)


AutoConfig.register("madeup_bert", MadeUpConfig)
AutoModelForMaskedLM.register(MadeUpConfig, MadeUpForMaskedLM)

if __name__ == "__main__":
    FAMILIES.append(MadeUpFamily())
    script = sys.argv.pop(1)
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / script), run_name="__main__")
