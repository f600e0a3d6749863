"""Export the trained student as a Hugging Face folder that loads without this project."""

from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from transformers import PreTrainedModel

from distilspeed.trainer.files import folder_written_whole
from distilspeed.trainer.models.inputs import tokenizer_for
from distilspeed.trainer.training.model_card import TrainingRecord, model_card


def gather_weights(engine: deepspeed.DeepSpeedEngine, student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the student's full float32 weights on the CPU, by the student's own names.

    In half-precision training these are the optimiser's float32 copies, not the rounded weights. Called by every
    rank, because ZeRO shards the weights; rank 0 gets the weights, other ranks get {}.
    """
    weights = {}
    for name, parameter in student.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        full = parameter.detach() if full is None else full
        if engine.global_rank == 0:
            weights[name] = full.to(device="cpu", dtype=torch.float32, copy=True)
    return weights


def whole_student(student: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return the student as a plain float32 model on the CPU, from its gathered weights, without vocabulary padding.

    Only the config and class of ``student`` are used: under ZeRO-3 its parameters are partitioned.
    """
    model = type(student)._from_config(student.config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][: len(parameter)])
    return model.eval()


def export_student(student: PreTrainedModel, record: TrainingRecord, folder: Path) -> None:
    """Write config, safetensors, tokenizer and model card to ``folder``, replacing a student of fewer steps.

    The folder is written atomically.
    """
    with folder_written_whole(folder, replaces=True) as beside:
        student.save_pretrained(beside)
        tokenizer_for(student, record.corpus.load_tokenizer()).save_pretrained(beside)
        model_card(record).save(beside / "README.md")
