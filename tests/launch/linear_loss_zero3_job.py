"""A job for the launcher: train with the linear distillation loss under each ZeRO stage, and save the parameters.

    deepspeed linear_loss_zero3_job.py FOLDER STAGE...

The vocabulary projection shares the embeddings' weight, and its own forward is never called: the loss reads the weight,
inside the forward of the module that DeepSpeed wraps.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DistilBertConfig, DistilBertForMaskedLM

from distilspeed.kernels.linear_distillation_loss import linear_distillation_loss
from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.student import student_engine
from distilspeed.trainer.job.ranks import joined_job, this_process

ROWS, LENGTH, STEPS, LEARNING_RATE = 8, 16, 2, 0.05
VOCAB_SIZE, HIDDEN_SIZE, TEACHER_HIDDEN_SIZE = 101, 32, 48


class Batch(NamedTuple):
    tokens: Tensor  # [rows, length]
    labels: Tensor  # [rows, length]
    teacher_hidden: Tensor  # [rows, length, teacher hidden size]


def global_batch() -> tuple[Batch, Tensor]:
    """Return all rows of a step, and the teacher's vocabulary projection."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
    labels = tokens.where(torch.rand(ROWS, LENGTH, generator=generator) < 0.15, -100)
    teacher_hidden = torch.randn(ROWS, LENGTH, TEACHER_HIDDEN_SIZE, generator=generator)
    teacher_weight = 0.3 * torch.randn(VOCAB_SIZE, TEACHER_HIDDEN_SIZE, generator=generator)
    return Batch(tokens, labels, teacher_hidden), teacher_weight


def make_student() -> DistilBertForMaskedLM:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=VOCAB_SIZE,
        dim=HIDDEN_SIZE,
        hidden_dim=2 * HIDDEN_SIZE,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.2,  # large, so that its predictions differ from uniform
    )
    return DistilBertForMaskedLM(config)


class Distillation(nn.Module):
    """Student and loss; the means are over the global batch, and every rank has an equal share of it."""

    def __init__(self, student: DistilBertForMaskedLM, ranks: int) -> None:
        super().__init__()
        self.student = student
        self.ranks = ranks

    def forward(self, batch: Batch, teacher_weight: Tensor, labelled: int) -> Tensor:
        student = self.student
        hidden = student.distilbert(batch.tokens).last_hidden_state
        hidden = student.vocab_layer_norm(student.activation(student.vocab_transform(hidden)))
        projection = student.vocab_projector
        return linear_distillation_loss(
            hidden,
            projection.weight,
            batch.teacher_hidden,
            teacher_weight,
            batch.labels,
            student_bias=projection.bias,
            soft_normalizer=ROWS * LENGTH / self.ranks,
            hard_normalizer=labelled / self.ranks,
        ).loss


def train(stage: int, output: Path) -> None:
    process = this_process()
    config = DeepSpeedConfig(
        {
            "train_batch_size": ROWS,
            "train_micro_batch_size_per_gpu": ROWS // process.world_size,
            "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            # With a threshold above 0, parameters as small as these stay whole on every rank.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
    )
    engine = student_engine(Distillation(make_student(), process.world_size), config)
    student = engine.module.student
    assert (student.vocab_projector.weight.numel() == 0) == (stage == 3), "stage 3 leaves no weight whole"
    whole, teacher_weight = global_batch()
    shares = Batch._make(part.chunk(process.world_size)[process.rank] for part in whole)
    for _ in range(STEPS):
        engine.backward(engine(shares, teacher_weight, int((whole.labels != -100).sum())))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(student.parameters())):
        parameters = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    if process.rank == 0:
        save_file(parameters, output / f"stage{stage}.safetensors")


if __name__ == "__main__":
    folder, *stages = sys.argv[-3:]
    with joined_job(this_process()):
        for stage in stages:
            train(int(stage), Path(folder))
