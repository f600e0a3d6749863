"""Fine-tune a model on a task and score it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.evaluation.tasks.task import Batch, Feature, FineTuning, Predictions, Scores, Task
from distilspeed.trainer.models.inputs import input_names
from distilspeed.trainer.models.loading import load_with_head

# The settings of Devlin et al. 2019 for BERT.
WARMUP_FRACTION = 0.1
WEIGHT_DECAY = 0.01
GRADIENT_CLIPPING = 1.0


def fine_tune(
    model_name: str,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    settings: FineTuning,
    seed: int,
    device: torch.device,
) -> Scores:
    """Fine-tune a pre-trained model on a task, in float32, and return its scores on dev after the last epoch.

    Training uses AdamW, linear warm-up over 10 % of the steps, linear decay to 0, and gradient clipping at 1. The seed
    determines the new head, the dropout and the order of the features.

    Args:
        model_name: a folder or hub id with safetensors weights.

    Raises:
        NumericalError: a score is not finite.
    """
    torch.manual_seed(seed)
    model = nn.Module.to(load_with_head(model_name, task.head), device)
    _train(model, task, tokenizer, settings)
    features = task.features(task.dev, tokenizer, settings.max_length)
    predictions = _predict(model, _batches(model, task, features, tokenizer, settings.batch_size))
    found = task.score(features, predictions)
    scores = {metric: found[metric] for metric in task.metrics}
    for metric, score in scores.items():
        if not math.isfinite(score):
            raise NumericalError(
                f"{model_name} fine-tuned on the task {task.name} with seed {seed} has {metric} {score}; "
                "lower the learning rate"
            )
    return scores


def _train(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerFast, settings: FineTuning
) -> None:
    features = task.features(task.train, tokenizer, settings.max_length)
    batches = _batches(model, task, features, tokenizer, settings.batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    steps = settings.epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * steps), steps)

    model.train()
    for _ in range(settings.epochs):
        for batch in batches:
            inputs = _on_device(batch, model)
            task.loss(model(**inputs), inputs).backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIPPING)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _batches(
    model: PreTrainedModel,
    task: Task,
    features: Sequence[Feature],
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    shuffle: bool = False,
) -> DataLoader[Any]:
    inputs = model_inputs(model, features)
    return DataLoader(inputs, batch_size, shuffle, collate_fn=task.collator(tokenizer))  # type: ignore[arg-type]


def model_inputs(model: PreTrainedModel, features: Sequence[Feature]) -> list[Feature]:
    """Keep only the values that the model accepts: drop token types it does not take, and values for the score."""
    accepted = input_names(model)
    return [{key: value for key, value in feature.items() if key in accepted} for feature in features]


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
