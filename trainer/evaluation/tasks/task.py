"""The protocol of a task: what fine-tuning and the report ask of each.

A task is a frozen dataclass that holds its examples. Its class stands in ``registry.TASKS``; fine-tuning, table, plot
and report.json follow from there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

from distilspeed.trainer.models.loading import Head

# A row of a batch as tokenizers give it: values by the names of the model's arguments. Other names are for
# ``Task.score`` and do not go to the model.
Feature = dict[str, Any]
Batch = Mapping[str, torch.Tensor]
# A model's outputs by transformers' names ("logits", "start_logits"): a float32 tensor a feature, on the CPU.
Predictions = Mapping[str, list[torch.Tensor]]
Scores = dict[str, float]  # by the name of the metric


@dataclass(frozen=True)
class FineTuning:
    """How each model is fine-tuned; ``max_length`` in tokens."""

    epochs: int
    learning_rate: float
    batch_size: int
    max_length: int


@dataclass(frozen=True)
class TaskConditions:
    """What a report tells of a task: its data, and how models are fine-tuned on it."""

    name: str
    metrics: tuple[str, ...]
    train_examples: int
    dev_examples: int
    fine_tuning: FineTuning

    def described(self) -> str:
        """The data in words; the end of a line."""
        return f"{self.train_examples:,} training and {self.dev_examples:,} dev examples"


@dataclass(frozen=True)
class Task(ABC):
    """Examples to fine-tune and to test on, and what a model is worth on them.

    Attributes:
        name: what the report calls it.
        train, dev: the examples, in a form of the task's own. Two dev sets are one sequence here, and two metrics.
    """

    name: str
    train: Sequence[Any]
    dev: Sequence[Any]

    @classmethod
    @abstractmethod
    def is_named(cls, name: str) -> bool:
        """Whether ``--task NAME`` is a task of this kind, by the name or by the files of a folder."""

    @classmethod
    @abstractmethod
    def read(cls, name: str) -> Self:
        """The task of that name.

        Raises:
            UserError: its data cannot be read or used.
        """

    @property
    @abstractmethod
    def head(self) -> Head:
        """What is put on a pre-trained encoder."""

    @property
    def fine_tuning(self) -> FineTuning:
        """The defaults of fine-tuning on it; models of fewer positions get shorter inputs."""
        return FineTuning(epochs=3, learning_rate=5e-5, batch_size=32, max_length=128)

    @abstractmethod
    def features(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        """``train`` or ``dev`` in rows of at most ``max_length`` tokens: one an example, or one a window of it."""

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Feature]], Mapping[str, Any]]:
        """What makes a batch of features: as here, pads the tokenizer's values; labels have one length."""
        return DataCollatorWithPadding(tokenizer)

    def loss(self, outputs: ModelOutput, batch: Batch) -> torch.Tensor:
        """The loss of a training batch, a scalar; here the model's own."""
        return outputs["loss"]

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Their names, as in GLUE and SQuAD ("accuracy", "matthews", "exact_match"); the first decides retention."""

    @abstractmethod
    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        """Each metric on ``dev``. 1 is best; 0 if undefined, as the correlation of constant predictions.

        Args:
            features: those of ``dev``, in order.
            predictions: "logits" [num_labels] of each, for example; outputs of tokens have the length of the batch
                that they were in, padding included.
        """

    def conditions(self, fine_tuning: FineTuning) -> TaskConditions:
        return TaskConditions(self.name, self.metrics, len(self.train), len(self.dev), fine_tuning)

    def warnings(self) -> Sequence[str]:
        """What a person should know of the data, a line each."""
        return ()
