"""Regression on sentences or pairs from two JSON-lines files whose labels are scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.jsonl import DEV, TRAIN, example_of, has_scores, read_records
from distilspeed.trainer.evaluation.tasks.metrics import pearson, spearman
from distilspeed.trainer.evaluation.tasks.sentences import Example, encode
from distilspeed.trainer.evaluation.tasks.task import Feature, Predictions, Scores, Task
from distilspeed.trainer.models.loading import Head


@dataclass(frozen=True)
class JsonLinesRegression(Task):
    """A folder with ``train.jsonl`` and ``dev.jsonl`` in which a label is a number with a decimal point."""

    train: tuple[Example, ...]
    dev: tuple[Example, ...]

    metrics = ("pearson", "spearman")
    head = Head(AutoModelForSequenceClassification, 1, "regression")

    @classmethod
    def is_named(cls, name: str) -> bool:
        return has_scores(Path(name))

    @classmethod
    def read(cls, name: str) -> Self:
        """Read the two files of the folder ``name``.

        Raises:
            UserError: as ``read_records``, and if a label is no finite number.
        """
        folder = Path(name)
        files = read_records(folder, _check_label)
        train, dev = (
            tuple(example_of(record, float(record["label"])) for record in files[file])
            for file in (TRAIN, DEV)
        )
        return cls(folder.resolve().name, train, dev)

    def features(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        return encode(examples, tokenizer, max_length)

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        answers = torch.cat(predictions["logits"]).tolist()
        labels = [feature["labels"] for feature in features]
        return {"pearson": pearson(labels, answers), "spearman": spearman(labels, answers)}


def _check_label(label: Any, where: str) -> None:
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if not is_number or not math.isfinite(label):
        raise UserError(
            "bad-task", f'{where} needs a number "label", because other lines have scores; correct it'
        )
