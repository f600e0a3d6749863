"""The training step: teacher, student, losses, accumulation, update."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from distilspeed.trainer.data.batches import DROPOUT_STREAM
from distilspeed.trainer.data.masking import philox
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.engine.phases import BACKWARD, DATA, TEACHER, UPDATE, phase
from distilspeed.trainer.engine.student import DTYPES, backward, loss_scale, optimizer_step, student_engine
from distilspeed.trainer.engine.teacher import make_teacher
from distilspeed.trainer.errors import OverflowAtLowestScale
from distilspeed.trainer.families.vocabulary import pad_vocabulary
from distilspeed.trainer.models.compilation import compile_encoder
from distilspeed.trainer.objective.objective import Distillation
from distilspeed.trainer.training.run import Run

# fp16: after this many skipped batches in a row at one loss scale, beyond its "hysteresis", assume the scale is stuck.
SKIPS_AT_ONE_SCALE = 5


class StepResult(NamedTuple):
    """One rank's part of an optimiser step."""

    # float32 [accumulation steps, 1 + terms] on the device: this rank's shares of the loss and of each term
    parts: torch.Tensor
    # bool [accumulation steps] on the device: gradients that enter the encoder's layers
    gradients_are_finite: torch.Tensor
    grad_norm: float | torch.Tensor | None  # of the global batch, before clipping
    is_update: bool  # false if fp16 gradients overflowed, or DeepSpeed skipped the step for another reason


class TrainingStep:
    """Takes one rank's part of optimiser steps; created by every rank in ``joined_job``. Modifies the run's models.

    Attributes:
        engine: the DeepSpeed engine around student and losses.
    """

    def __init__(self, run: Run) -> None:
        arguments, batch = run.arguments, run.batch
        self.rank = run.process.rank
        self.seed = arguments.seed
        self.batch = batch
        self.skips_allowed = SKIPS_AT_ONE_SCALE + run.deepspeed_config.hysteresis
        self.last_scale, self.skips_at_last_scale = 0.0, 0
        self.objective = run.objective
        for model in run.models().values():
            pad_vocabulary(model)
            if arguments.compile == "on":
                compile_encoder(model)
        # The terms' own parameters must start the same on every rank and in every run.
        torch.manual_seed(arguments.seed)
        self.distillation = Distillation(
            run.student, self.objective, batch.world_size, batch.gradient_accumulation_steps
        )
        self.engine = student_engine(self.distillation, run.deepspeed_config)
        self.engine.train()
        self.teacher = None
        if run.teacher:
            self.teacher = make_teacher(
                run.teacher,
                DTYPES[run.precision],
                run.process.device,
                run.deepspeed_config,
                share_out=arguments.teacher_zero3,
            )

    def take(self, index: int, micro_batches: Iterator[MicroBatch]) -> StepResult:
        """Take an optimiser step on global batch ``index``, made of the next micro-batches.

        Only DeepSpeed's check of the gradient norm waits for the device.

        Raises:
            OverflowAtLowestScale: fp16 gradients overflow, and the loss scale does not fall.
        """
        parts, are_finite = [], []
        grad_norm = None
        for accumulation_step in range(self.batch.gradient_accumulation_steps):
            with phase(DATA):
                batch = next(micro_batches)
            seed_dropout(self.seed, index, self.batch.micro_batch_number(accumulation_step, self.rank))
            with phase(TEACHER):
                targets = None
                if self.teacher:
                    places, layers = self.objective.places(batch), self.objective.needs.teacher_layers
                    targets = self.teacher(batch, places, layers)
            scale = loss_scale(self.engine)
            loss = self.engine(batch, targets, scale)
            with phase(BACKWARD):
                backward(self.engine, loss)
            parts.append(self.distillation.last_parts)
            are_finite.append(self.distillation.last_gradient_is_finite)
            with phase(UPDATE):
                grad_norm = optimizer_step(self.engine)
        is_update = self.engine.was_step_applied()
        self._count_skips(is_update, scale)
        return StepResult(torch.stack(parts), torch.stack(are_finite), grad_norm, is_update)

    def _count_skips(self, is_update: bool, scale: float) -> None:
        if not self.engine.fp16_enabled():
            return  # in other precisions non-finite gradients are errors, and the metrics report them
        if is_update or scale != self.last_scale:
            self.skips_at_last_scale = 0
        self.last_scale = scale
        self.skips_at_last_scale += not is_update
        if self.skips_at_last_scale == self.skips_allowed:
            raise OverflowAtLowestScale(scale)


def seed_dropout(seed: int, batch: int, micro_batch: int) -> None:
    """Seed dropout as a function of (seed, global batch, micro-batch in it).

    A resumed run draws the same dropout as an uninterrupted one, also on another number of ranks.
    """
    drawn = int(philox(seed, batch, stream=(DROPOUT_STREAM, micro_batch)).random_raw())
    # Not torch.manual_seed: it formats a stack trace for each kind of device that is not in use, at every micro-step.
    torch.default_generator.manual_seed(drawn)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(drawn)
