"""The measured cases: this project's losses and their peers, on the same random inputs.

=======  ======================================  ==========================================================
group    inputs                                  floor: the least work, forward and backward
=======  ======================================  ==========================================================
logits   [tokens, vocabulary] twice, labels      2u and 3u bytes, u = tokens x vocabulary x bytes per entry
linear   [tokens, hidden] x [vocabulary,         two matrix products each,
         hidden] twice, labels                   2 x tokens x vocabulary x hidden operations per product
cosine   [tokens, hidden] twice                  2u and 3u bytes, u = tokens x hidden x bytes per entry
=======  ======================================  ==========================================================

Forward must read two tensors; backward must read both again and write one. A loss that writes its gradient in the
forward pass needs 3u in total, if a cache holds the rows that it reads twice.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.distillation_loss import distillation_loss
from distilspeed.kernels.profiling.linear_cases import linear_group
from distilspeed.kernels.profiling.measurement import Case, Floor, Tensors
from distilspeed.kernels.profiling.peers import (
    COMPILE,
    EAGER,
    HARD_WEIGHT,
    LIGER,
    NEMO,
    PEERS,
    SOFT_WEIGHT,
    compile_once,
    distilbert_cosine,
    distilbert_losses,
    eager_cosine,
    eager_losses,
    liger_logits,
    nemo_logits,
)
from distilspeed.kernels.profiling.problem import (
    GB_PER_S,
    LOGIT_SCALE,
    Group,
    Problem,
    floor_bytes,
    leaf,
    non_leaf,
    random_labels,
    random_pair,
    shown,
    single_launch_floor_bytes,
)
from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss

SEED = 0


def build_groups(problem: Problem, peers: frozenset[str] = PEERS) -> tuple[Group, ...]:
    """Return all groups with their inputs allocated; cases that need a peer outside ``peers`` are left out."""
    generator = torch.Generator(problem.device).manual_seed(SEED)
    groups = (build(problem, generator) for build in (logits_group, linear_group, cosine_group))
    return tuple(
        replace(group, cases=tuple(case for case in group.cases if case.peers <= peers)) for group in groups
    )


@dataclass(frozen=True)
class LogitInputs:
    """Logits of both models [tokens, vocabulary], labels int64 [tokens]; every row is soft."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    every_row: Tensor
    temperature: float

    @classmethod
    def random(cls, problem: Problem, generator: torch.Generator) -> "LogitInputs":
        shape = (problem.tokens, problem.vocab_size)
        student, teacher = random_pair(problem, generator, *shape, scale=LOGIT_SCALE, noise=1.0)
        labels = random_labels(problem, generator)
        every_row = torch.ones_like(labels, dtype=torch.bool)
        return cls(student, teacher, labels, every_row, problem.temperature)

    def fresh(self) -> Tensors:
        return (leaf(self.student),)

    def overwritable(self) -> Tensors:
        return (non_leaf(self.student),)

    def own(self, student: Tensor, inplace_backward: bool) -> Tensors:
        losses = distillation_loss(
            student,
            self.teacher,
            self.labels,
            temperature=self.temperature,
            inplace_backward=inplace_backward,
        )
        return (SOFT_WEIGHT * losses.kl + HARD_WEIGHT * losses.hard_ce,)

    def own_weighted(self, student: Tensor, inplace: bool) -> Tensors:
        weighted = weighted_distillation_loss(
            student,
            self.teacher,
            self.labels,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            loss_scale=1.0,
            temperature=self.temperature,
            inplace=inplace,
        )
        return (weighted.loss,)


def logits_group(problem: Problem, generator: torch.Generator) -> Group:
    shape = (problem.tokens, problem.vocab_size)
    inputs = LogitInputs.random(problem, generator)
    floor = floor_bytes(*shape, problem.dtype)
    single_launch_floor = single_launch_floor_bytes(*shape, problem.dtype)
    cases = (*own_logit_cases(inputs, floor, single_launch_floor), *peer_logit_cases(inputs, floor))
    return Group("logits", shown(problem, shape), GB_PER_S, cases)


def own_logit_cases(inputs: LogitInputs, floor: Floor, single_launch_floor: Floor) -> tuple[Case, ...]:
    return (
        Case(
            "distillation_loss",
            "5 kl + 2 hard_ce",
            floor,
            inputs.fresh,
            functools.partial(inputs.own, inplace_backward=False),
        ),
        Case(
            "distillation_loss, inplace_backward",
            "the same, the gradient written over the student's logits",
            floor,
            inputs.overwritable,
            functools.partial(inputs.own, inplace_backward=True),
        ),
        Case(
            "weighted_distillation_loss",
            "the same sum, its gradient computed in the forward pass",
            single_launch_floor,
            inputs.fresh,
            functools.partial(inputs.own_weighted, inplace=False),
        ),
        Case(
            "weighted_distillation_loss, inplace",
            "the same, the gradient written over the student's logits",
            single_launch_floor,
            inputs.overwritable,
            functools.partial(inputs.own_weighted, inplace=True),
        ),
    )


def peer_logit_cases(inputs: LogitInputs, floor: Floor) -> tuple[Case, ...]:
    teacher, labels, every_row = inputs.teacher, inputs.labels, inputs.every_row
    temperature = inputs.temperature
    return (
        Case(
            "eager recipe",
            "the same in PyTorch as in DistilBERT's training code, masked_select of the logits included",
            floor,
            inputs.fresh,
            lambda student: (distilbert_losses(student, teacher, labels, every_row, temperature),),
            peers=EAGER,
        ),
        Case(
            "torch.compile of the recipe",
            "the same function compiled",
            floor,
            inputs.fresh,
            lambda student: (
                compile_once(distilbert_losses)(student, teacher, labels, every_row, temperature),
            ),
            peers=COMPILE,
        ),
        Case(
            "torch.compile, no masked_select",
            "the recipe compiled without masked_select, which selects all rows here",
            floor,
            inputs.fresh,
            lambda student: (compile_once(eager_losses)(student, teacher, labels, temperature),),
            peers=COMPILE,
        ),
        Case(
            "Liger kl_div and cross_entropy",
            "softmaxes in PyTorch, then Liger's kernels; cross_entropy overwrites the student's logits",
            floor,
            inputs.overwritable,
            lambda student: (liger_logits(student, teacher, labels, temperature),),
            peers=LIGER,
        ),
        Case(
            "NeMo soft cross-entropy",
            "softmax of the teacher in PyTorch, NeMo Automodel's kernel, then PyTorch's cross_entropy",
            floor,
            inputs.fresh,
            lambda student: (nemo_logits(student, teacher, labels, temperature),),
            peers=NEMO,
        ),
    )


def cosine_group(problem: Problem, generator: torch.Generator) -> Group:
    shape = (problem.tokens, problem.hidden_size)
    student, teacher = random_pair(problem, generator, *shape, scale=1.0, noise=1.0)
    every_row = torch.ones(problem.tokens, dtype=torch.bool, device=problem.device)

    def fresh() -> Tensors:
        return (leaf(student),)

    floor = floor_bytes(*shape, problem.dtype)
    cases = (
        Case(
            "cosine_loss",
            "mean of 1 - cos",
            floor,
            fresh,
            lambda student_hidden: (cosine_loss(student_hidden, teacher, mask=every_row),),
        ),
        Case(
            "eager cosine",
            "the same in PyTorch as in DistilBERT's training code, masked_select included",
            floor,
            fresh,
            lambda student_hidden: (distilbert_cosine(student_hidden, teacher, every_row),),
            peers=EAGER,
        ),
        Case(
            "torch.compile of eager cosine",
            "the same function compiled",
            floor,
            fresh,
            lambda student_hidden: (compile_once(distilbert_cosine)(student_hidden, teacher, every_row),),
            peers=COMPILE,
        ),
        Case(
            "torch.compile cosine, no masked_select",
            "the function compiled without masked_select, which selects all rows here",
            floor,
            fresh,
            lambda student_hidden: (compile_once(eager_cosine)(student_hidden, teacher),),
            peers=COMPILE,
        ),
    )
    return Group("cosine", shown(problem, shape), GB_PER_S, cases)
