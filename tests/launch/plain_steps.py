"""Optimiser steps of a plain PyTorch loop over whole global batches, to compare with the trainer's steps.

It uses no code of the trainer's step.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import forward_packed


def plain_steps(
    teacher_dir: Path, corpus_dir: Path, layers: Sequence[int], batch_size: int, rates: Sequence[float]
) -> tuple[torch.Tensor, list[float]]:
    """Return the weights' change and the gradients' norms of steps of plain SGD with these learning rates."""
    teacher = load_teacher(str(teacher_dir))
    student = make_student(teacher, layers)
    start = copied_weights(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=rates[0])
    batches = MicroBatches(
        open_corpus(corpus_dir), BatchEquation(batch_size, batch_size, 1, 1), rank=0, seed=0
    )
    hard_weight = {"masked": 2, "causal": 0.5}[family_of(teacher.config).objective]
    norms = []
    for batch, rate in zip(batches.loader(0, len(rates), num_workers=0), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        real, labelled = batch.document_ids >= 0, batch.labels >= 0
        ours, theirs = forward_packed(student, batch), forward_packed(teacher, batch)
        log_q = functional.log_softmax(ours.logits[real] / 2, dim=-1)
        p = functional.softmax(theirs.logits[real] / 2, dim=-1)
        soft = 4 * functional.kl_div(log_q, p, reduction="batchmean")
        hard = functional.cross_entropy(ours.logits[labelled], batch.labels[labelled])
        cosine = functional.cosine_similarity(ours.hidden_states[real], theirs.hidden_states[real], dim=-1)
        optimizer.zero_grad()
        (5 * soft + hard_weight * hard + (1 - cosine).mean()).backward()
        norms.append(nn.utils.get_total_norm(p.grad for p in student.parameters()).item())
        optimizer.step()
    return change(copied_weights(student), start), norms


def copied_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def change(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the change of all weights in one vector."""
    return torch.cat([(after[name] - before[name]).flatten() for name in before])
