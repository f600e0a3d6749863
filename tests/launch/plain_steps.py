"""Optimiser steps of a plain PyTorch loop over whole global batches, to compare with the trainer's steps.

It uses no code of the trainer's step.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.masking import SMOOTHING
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import forward_packed


def plain_steps(
    teacher_dir: Path, corpus_dir: Path, layers: Sequence[int], batch_size: int, rates: Sequence[float]
) -> tuple[torch.Tensor, list[float]]:
    """Return the weights' change and the gradients' norms of steps of plain SGD with these learning rates."""
    teacher = load_teacher(str(teacher_dir))
    return plain_steps_of(make_student(teacher, layers), teacher, corpus_dir, batch_size, rates)


def plain_steps_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    corpus_dir: Path,
    batch_size: int,
    rates: Sequence[float],
    seed: int = 0,
    mlm_smoothing: float = SMOOTHING,
) -> tuple[torch.Tensor, list[float]]:
    """Train this student in place; see :func:`plain_steps`. Without a teacher: masked language modelling alone."""
    start = copied_weights(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=rates[0])
    equation = BatchEquation(batch_size, batch_size, 1, 1)
    batches = MicroBatches(open_corpus(corpus_dir), equation, 0, seed, mlm_smoothing)
    norms = []
    for batch, rate in zip(batches.loader(0, len(rates), num_workers=0), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plain_loss(student, teacher, batch).backward()
        norms.append(nn.utils.get_total_norm(p.grad for p in student.parameters()).item())
        optimizer.step()
    return change(copied_weights(student), start), norms


def plain_loss(student: PreTrainedModel, teacher: PreTrainedModel | None, batch: MicroBatch) -> torch.Tensor:
    """Return the objective with its default weights; the cosine only of hidden states of the same width."""
    real, labelled = batch.document_ids >= 0, batch.labels >= 0
    ours = forward_packed(student, batch)
    weight = {"masked": 2, "causal": 0.5}[family_of(student.config).objective]
    hard = weight * functional.cross_entropy(ours.logits[labelled], batch.labels[labelled])
    if teacher is None:
        return hard
    theirs = forward_packed(teacher, batch)
    log_q = functional.log_softmax(ours.logits[real] / 2, dim=-1)
    p = functional.softmax(theirs.logits[real] / 2, dim=-1)
    soft = 4 * functional.kl_div(log_q, p, reduction="batchmean")
    if ours.hidden_states.shape != theirs.hidden_states.shape:
        return 5 * soft + hard
    cosine = functional.cosine_similarity(ours.hidden_states[real], theirs.hidden_states[real], dim=-1)
    return 5 * soft + hard + (1 - cosine).mean()


def copied_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def change(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the change of all weights in one vector."""
    return torch.cat([(after[name] - before[name]).flatten() for name in before])
