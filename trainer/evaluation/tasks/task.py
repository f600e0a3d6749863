"""The protocol of a task, used by fine-tuning and the report.

A task is a frozen dataclass that holds its examples. Add its class to ``registry.TASKS``; fine-tuning, table, plot and
report.json then include it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from distilspeed.trainer.models.loading import Head

# One row of a batch, as tokenizers return it: values by the names of the model's arguments. Values with other names are
# for ``Task.score``; the model does not get them.
Feature = dict[str, Any]
Batch = Mapping[str, torch.Tensor]
# A model's outputs by transformers' names ("logits", "start_logits"): one float32 tensor per feature, on the CPU.
Predictions = Mapping[str, list[torch.Tensor]]
Scores = dict[str, float]  # by the name of the metric


def shown_scores(scores: Scores) -> str:
    """Return scores as a text, for example "accuracy 81.3 %, f1 84.0 %"."""
    return ", ".join(f"{metric} {100 * score:.1f} %" for metric, score in scores.items())


@dataclass(frozen=True)
class FineTuning:
    """The settings of fine-tuning; ``max_length`` in tokens."""

    epochs: int
    learning_rate: float
    batch_size: int
    max_length: int

    def within(self, positions: int) -> "FineTuning":
        """Return the settings with inputs that fit a model's positions."""
        return replace(self, max_length=min(self.max_length, positions))


@dataclass(frozen=True)
class TaskConditions:
    """The data of a task and the settings of fine-tuning, for the report."""

    name: str
    metrics: tuple[str, ...]
    train_examples: int
    dev_examples: int
    fine_tuning: FineTuning

    def described(self) -> str:
        """Describe the data in words, as the end of a line."""
        return f"{self.train_examples:,} training and {self.dev_examples:,} dev examples"

    def line(self, learning_rate: str) -> str:
        """Describe metrics, settings and data in one line.

        Args:
            learning_rate: the rate, or in words how it was chosen.
        """
        how = self.fine_tuning
        return (
            f"{self.name}: {' and '.join(self.metrics)}; {how.epochs} epochs, learning rate {learning_rate}, batch "
            f"{how.batch_size}, at most {how.max_length} tokens; {self.described()}."
        )


@dataclass(frozen=True)
class Task(ABC):
    """Examples to fine-tune and to evaluate on, and the score of a model on them.

    Attributes:
        name: the name in the report.
        train, dev: the examples, in the task's own form. Join two dev sets to one sequence with two metrics.
    """

    name: str
    train: Sequence[Any]
    dev: Sequence[Any]

    @classmethod
    @abstractmethod
    def is_named(cls, name: str) -> bool:
        """Return whether ``--task NAME`` is a task of this kind, by its name or the files of a folder."""

    @classmethod
    @abstractmethod
    def read(cls, name: str) -> Self:
        """Read the task with that name.

        Raises:
            UserError: its data cannot be read or used.
        """

    @property
    @abstractmethod
    def head(self) -> Head:
        """The head on the pre-trained encoder."""

    @property
    def fine_tuning(self) -> FineTuning:
        """The default settings of fine-tuning; inputs are shorter if a model has fewer positions."""
        return FineTuning(epochs=3, learning_rate=5e-5, batch_size=32, max_length=128)

    @abstractmethod
    def features(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        """Tokenise ``train`` or ``dev`` into rows of at most ``max_length`` tokens, one per example or window."""

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Feature]], Mapping[str, Any]]:
        """Return the function that collates features; the default pads the tokenizer's values, but not labels."""
        return DataCollatorWithPadding(tokenizer)

    def loss(self, outputs: ModelOutput, batch: Batch) -> torch.Tensor:
        """Return the loss of a training batch, a scalar; the default is the model's own loss."""
        return outputs["loss"]

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, as in GLUE and SQuAD ("accuracy", "exact_match"); retention uses the first."""

    @abstractmethod
    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        """Return each metric on ``dev``: 1 is best, and 0 if undefined, as is the correlation of constant predictions.

        Args:
            features: the features of ``dev``, in order.
            predictions: outputs for each feature, for example "logits" [num_labels]. Outputs per token have the length
                of their batch, padding included.
        """

    def conditions(self, fine_tuning: FineTuning) -> TaskConditions:
        return TaskConditions(self.name, self.metrics, len(self.train), len(self.dev), fine_tuning)

    def warnings(self) -> Sequence[str]:
        """Return warnings about the data for the user, one line each."""
        return ()
