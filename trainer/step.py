"""The training step: teacher, student, losses, accumulation, update."""

from collections.abc import Iterator

import torch

from distilspeed.trainer.batches import DROPOUT_STREAM, MicroBatch
from distilspeed.trainer.config import TrainArguments
from distilspeed.trainer.distillation import Distillation, LossParts, Objective
from distilspeed.trainer.engines import loss_scale, optimizer_step, student_engine
from distilspeed.trainer.families import pad_vocabulary
from distilspeed.trainer.masking import philox
from distilspeed.trainer.phases import BACKWARD, DATA, TEACHER, UPDATE, phase
from distilspeed.trainer.run import Run
from distilspeed.trainer.teacher import make_teacher


class TrainingStep:
    """One rank's part of optimiser steps; made by every rank, after ``join_job``. The run's models become its own.

    Attributes:
        engine: DeepSpeed's, around student and losses.
    """

    def __init__(self, run: Run) -> None:
        arguments, batch = run.arguments, run.batch
        self.rank = run.process.rank
        self.seed = arguments.seed
        self.accumulation_steps = batch.gradient_accumulation_steps
        self.objective = objective_of(arguments)
        for model in run.models().values():
            pad_vocabulary(model)
            if arguments.compile:
                model.base_model.compile()
        self.distillation = Distillation(
            run.student, self.objective, batch.world_size, self.accumulation_steps
        )
        self.engine = student_engine(self.distillation, run.deepspeed_config)
        self.engine.train()
        self.teacher = make_teacher(run) if run.teacher else None

    def take(
        self, step: int, micro_batches: Iterator[MicroBatch]
    ) -> tuple[torch.Tensor, float | torch.Tensor | None]:
        """Take optimiser step ``step``, counted from 0, on the next micro-batches. Nothing here waits for the device.

        Returns:
            this rank's share of the global batch's loss parts, float32 [4] on the device in the order of
            :class:`LossParts`; and the gradient's norm before clipping.
        """
        seed_dropout(self.seed, step, self.rank)
        shares = torch.zeros(len(LossParts._fields), device=self.engine.device)
        grad_norm = None
        for _ in range(self.accumulation_steps):
            with phase(DATA):
                batch = next(micro_batches)
            with phase(TEACHER):
                targets = self.teacher(batch, self.objective.scored_places(batch)) if self.teacher else None
            loss = self.engine(batch, targets, loss_scale(self.engine))
            with phase(BACKWARD):
                self.engine.backward(loss)
            shares += torch.stack(self.distillation.last_parts)
            with phase(UPDATE):
                grad_norm = optimizer_step(self.engine)
        return shares, grad_norm


def objective_of(arguments: TrainArguments) -> Objective:
    return Objective(
        arguments.alpha_ce,
        arguments.alpha_mlm,
        arguments.alpha_cos,
        arguments.temperature,
        arguments.restrict_ce_to_mask,
    )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout as a function of (seed, step, rank): a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed(int(philox(seed, step, stream=(DROPOUT_STREAM, rank)).random_raw()))
