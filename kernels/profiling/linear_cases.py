"""The cases that include the vocabulary projections: [tokens, hidden] x [vocabulary, hidden] of both models."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distilspeed.kernels.distillation_loss import distillation_loss
from distilspeed.kernels.linear_distillation_loss import linear_distillation_loss
from distilspeed.kernels.profiling.measurement import Case, Tensors
from distilspeed.kernels.profiling.peers import (
    COMPILE,
    EAGER,
    HARD_WEIGHT,
    LIGER,
    SOFT_WEIGHT,
    distilbert_losses,
    liger_linear,
    project_back,
    project_both,
)
from distilspeed.kernels.profiling.problem import (
    GFLOP_PER_S,
    LOGIT_SCALE,
    Group,
    Problem,
    leaf,
    projection_flops,
    random_labels,
    random_normal,
    random_pair,
    shown,
)

MATRIX_PRODUCTS = "matrix products alone"


@dataclass(frozen=True)
class LinearInputs:
    """Hidden states [tokens, hidden] and weights [vocabulary, hidden] of both models, labels int64 [tokens]."""

    student: tuple[Tensor, Tensor]  # hidden states, weight
    teacher: tuple[Tensor, Tensor]
    labels: Tensor
    every_row: Tensor
    temperature: float

    @classmethod
    def random(cls, problem: Problem, generator: torch.Generator) -> "LinearInputs":
        weight_shape = (problem.vocab_size, problem.hidden_size)
        one_logit = 1 / math.sqrt(problem.hidden_size)  # weights scaled by this give standard normal logits
        student_weight, teacher_weight = random_pair(
            problem, generator, *weight_shape, scale=LOGIT_SCALE * one_logit, noise=one_logit
        )
        hidden = random_normal(problem, generator, problem.tokens, problem.hidden_size).to(problem.dtype)
        labels = random_labels(problem, generator)
        return cls(
            student=(hidden, student_weight),
            teacher=(hidden.clone(), teacher_weight),
            labels=labels,
            every_row=torch.ones_like(labels, dtype=torch.bool),
            temperature=problem.temperature,
        )

    def fresh(self) -> Tensors:
        return tuple(map(leaf, self.student))

    def own(self, hidden: Tensor, weight: Tensor) -> Tensors:
        losses = linear_distillation_loss(
            hidden,
            weight,
            *self.teacher,
            self.labels,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            temperature=self.temperature,
        )
        return (losses.loss,)

    def own_on_logits(self, hidden: Tensor, weight: Tensor) -> Tensors:
        logits = project_both(hidden, weight, *self.teacher)
        losses = distillation_loss(*logits, self.labels, temperature=self.temperature)
        return (SOFT_WEIGHT * losses.kl + HARD_WEIGHT * losses.hard_ce,)

    def eager_on_logits(self, hidden: Tensor, weight: Tensor) -> Tensors:
        logits = project_both(hidden, weight, *self.teacher)
        return (distilbert_losses(*logits, self.labels, self.every_row, self.temperature),)

    def liger(self, hidden: Tensor, weight: Tensor, compiled: bool) -> Tensors:
        return (
            liger_linear(hidden, weight, *self.teacher, self.labels, self.temperature, compiled=compiled),
        )


def linear_group(problem: Problem, generator: torch.Generator) -> Group:
    inputs = LinearInputs.random(problem, generator)
    floor = projection_flops(problem.tokens, problem.vocab_size, problem.hidden_size)
    cases = (
        Case("linear_distillation_loss", "5 kl + 2 hard_ce", floor, inputs.fresh, inputs.own),
        Case(
            "projections, distillation_loss",
            "the same from whole logits",
            floor,
            inputs.fresh,
            inputs.own_on_logits,
        ),
        Case(
            "projections, eager recipe",
            "the same in PyTorch as in DistilBERT's training code",
            floor,
            inputs.fresh,
            inputs.eager_on_logits,
            peers=EAGER,
        ),
        Case(
            "Liger fused linear",
            "LigerFusedLinearJSDLoss with beta 0, soft targets averaged over the labelled rows",
            floor,
            inputs.fresh,
            functools.partial(inputs.liger, compiled=False),
            peers=LIGER,
        ),
        Case(
            "Liger fused linear, compiled",
            "the same with compiled=True, Liger's default",
            floor,
            inputs.fresh,
            functools.partial(inputs.liger, compiled=True),
            peers=LIGER | COMPILE,
        ),
        Case(
            MATRIX_PRODUCTS,
            "both projections and the two products of backward, with the student's logits as their gradient",
            floor,
            lambda: inputs.student,
            lambda hidden, weight: project_both(hidden, weight, *inputs.teacher),
            lambda given, outputs: project_back(given[0], given[1], outputs[0]),
        ),
    )
    shapes = (problem.tokens, problem.hidden_size), (problem.vocab_size, problem.hidden_size)
    return Group("linear", shown(problem, *shapes), GFLOP_PER_S, cases, roof=MATRIX_PRODUCTS)
