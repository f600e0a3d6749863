"""The trained student as a Hugging Face folder that loads without this project."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.format import Corpus
from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.evaluation.quality import MaskedTokenQuality
from distilspeed.trainer.files import folder_written_whole
from distilspeed.trainer.objective.term import Term
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.metrics import StepMetrics

TOKENIZER_OUTPUTS = ("input_ids", "token_type_ids", "attention_mask")


def gather_weights(engine: deepspeed.DeepSpeedEngine, student: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The student's float32 weights on the CPU, whole, under the student's own names.

    In half-precision training these are the optimiser's float32 copies, not the rounded ones. Every
    rank calls this, because under ZeRO each holds a part; rank 0 keeps the result, the others get {}.
    """
    weights = {}
    for name, parameter in student.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        full = parameter.detach() if full is None else full
        if engine.global_rank == 0:
            weights[name] = full.to(device="cpu", dtype=torch.float32, copy=True)
    return weights


@dataclass(frozen=True)
class TrainingRecord:
    """What the model card says of the run."""

    arguments: TrainArguments
    terms: Sequence[Term]  # of which the metrics have values
    deepspeed_config: ResolvedConfig
    corpus: Corpus
    layers: Sequence[int]
    world_size: int
    last_step: StepMetrics
    held_out: MaskedTokenQuality
    changes: Sequence[str] = ()  # made when the run was resumed


def whole_student(student: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The student as one ordinary float32 model on the CPU, from its gathered weights, without vocabulary padding.

    ``student`` itself gives only its config: under ZeRO-3 its parameters are partitioned.
    """
    model = type(student)._from_config(student.config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][: len(parameter)])
    return model.eval()


def export_student(student: PreTrainedModel, record: TrainingRecord, folder: Path) -> None:
    """Write config, safetensors, tokenizer and model card to ``folder``, in place of a student of fewer steps.

    It appears whole or not at all.
    """
    with folder_written_whole(folder, replaces=True) as beside:
        student.save_pretrained(beside)
        tokenizer_for(student, record.corpus).save_pretrained(beside)
        (beside / "README.md").write_text(model_card(record), encoding="utf-8")


def tokenizer_for(model: PreTrainedModel, corpus: Corpus) -> PreTrainedTokenizerFast:
    """The corpus's tokenizer, to be saved with a model: it gives the inputs that the model takes and no others.

    DistilBERT takes no token types, and before transformers 5 a pipeline passes on all that a tokenizer gives.
    """
    tokenizer = corpus.load_tokenizer()
    taken = inspect.signature(model.forward).parameters
    names = [name for name in TOKENIZER_OUTPUTS if name in taken]
    # save_pretrained writes what a tokenizer was made with, not the attribute.
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = names
    return tokenizer


def model_card(record: TrainingRecord) -> str:
    """The model card: teacher, data, losses, hyper-parameters, results."""
    arguments, config, last = record.arguments, record.deepspeed_config, record.last_step
    optimizer, scheduler = config.optimizer, config.scheduler
    assert optimizer is not None
    parts = ", ".join(f"{term.shown.short} {last.losses[term.name]:.4f}" for term in record.terms)
    rows: list[tuple[str, object]] = []
    if arguments.has_teacher:
        rows += [
            (
                "Teacher",
                Path(arguments.teacher).name if Path(arguments.teacher).exists() else arguments.teacher,
            ),
            ("Starts from the teacher's layers", ", ".join(map(str, record.layers))),
            *((term.shown.card, f"{term.weight:g} × {term.described()}") for term in record.terms),
        ]
    else:
        rows += [("Teacher", "none: masked language modelling from random weights")]
    rows += [
        ("Data", ", ".join(source.name for source in record.corpus.manifest.sources)),
        ("Row length", f"{record.corpus.manifest.seq_length} tokens, packed, attention within documents"),
        ("Masking", "dynamic, 15 % of the tokens, probability ∝ count^-0.7"),
        ("Real tokens seen", f"{last.tokens:,} in {last.step:,} steps ({last.epoch:.2f} epochs)"),
        ("Global batch", f"{config.batch.train_batch_size} rows on {record.world_size} ranks"),
        ("Optimiser", f"{optimizer.type} {optimizer.params}"),
        ("Schedule", f"{scheduler.type} {scheduler.params}" if scheduler else "constant "),
        ("Gradient clipping", "none" if config.gradient_clipping is None else config.gradient_clipping),
        *(("Changed", change) for change in record.changes),
        ("Seed", arguments.seed),
        (
            "Final training loss",
            f"{last.loss:.4f} ({parts})",
        ),
        (
            "Held-out rows",
            f"MLM loss {record.held_out.loss:.4f}, accuracy {record.held_out.accuracy:.1%} "
            f"of {record.held_out.masked_tokens:,} masked tokens",
        ),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    what = "distilled student" if arguments.has_teacher else "masked language model"
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags:
- distilspeed
---

# {what.capitalize()}

A {what} trained with distilspeed, after Sanh et al. 2019 (arXiv 1910.01108).
Load it with `AutoModelForMaskedLM.from_pretrained`.

| | |
|---|---|
{table}
"""
