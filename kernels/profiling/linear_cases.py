"""What is measured with the vocabulary projection included: [tokens, hidden] x [vocabulary, hidden] of both models."""

import math

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
    project,
    project_back,
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
    shown,
)

MATRIX_PRODUCTS = "matrix products alone"


def linear_group(problem: Problem, generator: torch.Generator) -> Group:
    hidden_shape = (problem.tokens, problem.hidden_size)
    weight_shape = (problem.vocab_size, problem.hidden_size)
    one_logit = 1 / math.sqrt(problem.hidden_size)  # so scaled, weights make standard normal logits
    exact = LOGIT_SCALE * one_logit * random_normal(problem, generator, *weight_shape)
    student_weight = exact.to(problem.dtype, copy=True)
    exact += one_logit * random_normal(problem, generator, *weight_shape)
    teacher_weight = exact.to(problem.dtype)
    student_hidden = random_normal(problem, generator, *hidden_shape).to(problem.dtype)
    teacher = (student_hidden.clone(), teacher_weight)
    labels = random_labels(problem, generator)
    every_row = torch.ones_like(labels, dtype=torch.bool)
    temperature = problem.temperature

    def fresh() -> Tensors:
        return (leaf(student_hidden), leaf(student_weight))

    def own(hidden: Tensor, weight: Tensor) -> Tensors:
        losses = linear_distillation_loss(
            hidden,
            weight,
            *teacher,
            labels,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            temperature=temperature,
        )
        return (losses.loss,)

    def own_on_logits(hidden: Tensor, weight: Tensor) -> Tensors:
        logits = project(hidden, weight, *teacher)
        losses = distillation_loss(*logits, labels, temperature=temperature)
        return (SOFT_WEIGHT * losses.kl + HARD_WEIGHT * losses.hard_ce,)

    def eager_on_logits(hidden: Tensor, weight: Tensor) -> Tensors:
        logits = project(hidden, weight, *teacher)
        return (distilbert_losses(*logits, labels, every_row, temperature),)

    floor = projection_flops(problem.tokens, problem.vocab_size, problem.hidden_size)
    cases = (
        Case("linear_distillation_loss", "5 kl + 2 hard_ce", floor, fresh, own),
        Case(
            "projections, distillation_loss",
            "the same from whole logits",
            floor,
            fresh,
            own_on_logits,
        ),
        Case(
            "projections, eager recipe",
            "the same in PyTorch as in DistilBERT's training code",
            floor,
            fresh,
            eager_on_logits,
            peers=EAGER,
        ),
        Case(
            "Liger fused linear",
            "LigerFusedLinearJSDLoss with beta 0, soft targets averaged over the labelled rows",
            floor,
            fresh,
            lambda hidden, weight: (
                liger_linear(hidden, weight, *teacher, labels, temperature, compiled=False),
            ),
            peers=LIGER,
        ),
        Case(
            "Liger fused linear, compiled",
            "the same with compiled=True, Liger's default",
            floor,
            fresh,
            lambda hidden, weight: (
                liger_linear(hidden, weight, *teacher, labels, temperature, compiled=True),
            ),
            peers=LIGER | COMPILE,
        ),
        Case(
            MATRIX_PRODUCTS,
            "both projections and, from the student's logits as their gradient, the two products of backward",
            floor,
            lambda: (student_hidden, student_weight),
            lambda hidden, weight: project(hidden, weight, *teacher),
            lambda inputs, outputs: project_back(inputs[0], inputs[1], outputs[0]),
        ),
    )
    return Group(
        "linear", shown(problem, hidden_shape, weight_shape), GFLOP_PER_S, cases, roof=MATRIX_PRODUCTS
    )
