"""Fine-tune a model on a task and score it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from distilspeed.trainer.data.masking import philox
from distilspeed.trainer.errors import NumericalError, UserError
from distilspeed.trainer.evaluation.task_checkpoint import TaskCheckpoint
from distilspeed.trainer.evaluation.task_distillation import TaskTeacher, soft_loss
from distilspeed.trainer.evaluation.tasks.task import Batch, Feature, FineTuning, Predictions, Scores, Task
from distilspeed.trainer.families.masks import EAGER
from distilspeed.trainer.models.attention import attention_candidates
from distilspeed.trainer.models.inputs import input_names
from distilspeed.trainer.models.loading import load_with_head

# The settings of Devlin et al. 2019 for BERT.
WARMUP_FRACTION = 0.1
WEIGHT_DECAY = 0.01
GRADIENT_CLIPPING = 1.0
# Random streams of philox(seed, epoch) and philox(seed, step).
ORDER_STREAM, DROPOUT_STREAM = (3, 0), (4, 0)
HALF_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FineTuningRun:
    """How to train on a task.

    Training uses AdamW with a weight decay of 0.01 (not of biases and norms), linear warm-up over 10 % of the steps,
    linear decay to 0, and gradient clipping at 1. Order and dropout depend only on the seed and the number of the step,
    so a resumed run computes the same.

    Attributes:
        seed: of the order of the features and of dropout.
        precision: fp32, or fp16 or bf16 by autocast; weights are float32.
        teacher: gives soft targets; None to learn from labels alone.
        checkpoint: where to save and resume; None for a run that cannot be resumed.
    """

    task: Task
    tokenizer: PreTrainedTokenizerFast
    settings: FineTuning
    seed: int
    precision: str = "fp32"
    teacher: TaskTeacher | None = None
    checkpoint: TaskCheckpoint | None = None

    def train(self, model: PreTrainedModel) -> None:
        """Train the model in place.

        Raises:
            NumericalError: a loss is not finite.
        """
        features = self.task.features(self.task.train, self.tokenizer, self.settings.max_length)
        names = set(input_names(model)).union(input_names(self.teacher.model) if self.teacher else ())
        inputs = [{name: value for name, value in feature.items() if name in names} for feature in features]
        collate = self.task.collator(self.tokenizer)
        steps_per_epoch = math.ceil(len(inputs) / self.settings.batch_size)
        steps = self.settings.epochs * steps_per_epoch
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=self.settings.learning_rate)
        schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * steps), steps)
        scaler = torch.amp.GradScaler(model.device.type, enabled=self.precision == "fp16")
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
        first = self.checkpoint.load(parts) if self.checkpoint else 0

        self._choose_attention(model)
        model.train()
        for step in range(first, steps):
            epoch, batch_number = divmod(step, steps_per_epoch)
            if batch_number == 0 or step == first:
                order = self._order(len(inputs), epoch)
            begin = batch_number * self.settings.batch_size
            places = order[begin : begin + self.settings.batch_size]
            batch = _on_device(collate([inputs[place] for place in places]), model)
            torch.manual_seed(int(philox(self.seed, step, DROPOUT_STREAM).random_raw()))
            loss = self._loss(model, batch)
            self._check(loss, step)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIPPING)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            if self.checkpoint and self.checkpoint.is_due(step + 1, steps):
                self.checkpoint.save(parts, step + 1)

    def _choose_attention(self, model: PreTrainedModel) -> None:
        """Avoid an implementation that is slow in the precision; the others stay as transformers chose them."""
        dtype = HALF_PRECISION.get(self.precision, torch.float32)
        length = self.settings.max_length
        if EAGER in attention_candidates(model.device, dtype, length, dropout=0.0, is_trained=True):
            model.set_attn_implementation(EAGER)

    def _order(self, count: int, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(philox(self.seed, epoch, ORDER_STREAM)).permutation(count)

    def _loss(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        with self._autocast(model):
            outputs = model(**_taken(batch, model))
            loss = self.task.loss(outputs, batch)
            if self.teacher is None:
                return loss
            targets = self.teacher.model(**_taken(batch, self.teacher.model))
        soft = soft_loss(outputs, targets, batch, self.teacher.temperature)
        return self.teacher.alpha_task * loss + self.teacher.alpha_ce * soft

    def _autocast(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(model.device.type, HALF_PRECISION[self.precision])

    def _check(self, loss: torch.Tensor, step: int) -> None:
        if not loss.isfinite():
            raise NumericalError(
                f"the loss on {self.task.name} is {loss.item()} at step {step + 1}; lower the learning rate"
            )

    def score(self, model: PreTrainedModel, name: str) -> Scores:
        """Return the model's scores on dev, in the task's order of metrics; leave the model in evaluation mode.

        Args:
            name: the model in error messages.

        Raises:
            NumericalError: a score is not finite.
        """
        features = self.task.features(self.task.dev, self.tokenizer, self.settings.max_length)
        inputs = model_inputs(model, features)
        batches: DataLoader[Any] = DataLoader(
            inputs,  # type: ignore[arg-type]
            self.settings.batch_size,
            collate_fn=self.task.collator(self.tokenizer),
        )
        found = self.task.score(features, _predict(model, batches))
        scores = {metric: found[metric] for metric in self.task.metrics}
        for metric, score in scores.items():
            if not math.isfinite(score):
                raise NumericalError(
                    f"{name} fine-tuned on the task {self.task.name} with seed {self.seed} has {metric} {score}; "
                    "lower the learning rate"
                )
        return scores


def fine_tune(
    model_name: str,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    settings: FineTuning,
    seed: int,
    device: torch.device,
    precision: str = "fp32",
) -> Scores:
    """Fine-tune a pre-trained model on a task, and return its scores on dev after the last epoch.

    The seed determines the new head, the dropout and the order of the features.

    Args:
        model_name: a folder or hub id with safetensors weights.
        precision: of :class:`FineTuningRun`.

    Raises:
        NumericalError: a loss or a score is not finite.
    """
    run = FineTuningRun(task, tokenizer, settings, seed, precision)
    torch.manual_seed(seed)
    model = nn.Module.to(load_with_head(model_name, task.head), device)
    run.train(model)
    return run.score(model, model_name)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameters for an optimiser: weights of layers and embeddings decay, biases and norms do not."""
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ``UserError`` if the device cannot fine-tune in a precision."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("unsupported-precision", "fine-tuning in fp16 needs a GPU; use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError("unsupported-precision", "this GPU has no bf16; use fp16 or fp32")


def model_inputs(model: PreTrainedModel, features: Sequence[Feature]) -> list[Feature]:
    """Keep only the values that the model accepts: drop token types it does not take, and values for the score."""
    accepted = input_names(model)
    return [{key: value for key, value in feature.items() if key in accepted} for feature in features]


def _taken(batch: Batch, model: PreTrainedModel) -> Batch:
    names = input_names(model)
    return {name: values for name, values in batch.items() if name in names}


def _on_device(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> Batch:
    return {name: values.to(model.device) for name, values in batch.items()}


@torch.inference_mode()
def _predict(model: PreTrainedModel, batches: DataLoader[Any]) -> Predictions:
    """Return the model's outputs for each feature, without the loss; leave the model in evaluation mode."""
    model.eval()
    predictions: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for name, values in model(**_on_device(batch, model)).items():
            if name != "loss":
                predictions.setdefault(name, []).extend(values.cpu())
    return predictions
