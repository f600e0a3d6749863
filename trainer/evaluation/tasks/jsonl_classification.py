"""Classification of sentences or pairs from two JSON-lines files.

A label is a class: an integer, a string or a boolean; all labels have the same type. Examples with the label of
unlabelled examples in SNLI and GLUE (-1, "-") are left out and counted.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.jsonl import Record, example_of, read_records
from distilspeed.trainer.evaluation.tasks.sentences import Example, encode
from distilspeed.trainer.evaluation.tasks.task import (
    Feature,
    FineTuning,
    Predictions,
    Scores,
    Task,
    TaskConditions,
)
from distilspeed.trainer.models.loading import Head

Label = int | str  # in Python, bool is an int

# Unlabelled examples of SNLI and GLUE's test sets have the label -1 in datasets, and "-" in SNLI's own files.
UNLABELLED = (-1, "-1", "-")
# SNLI has 0.1 % unlabelled examples in train and 1.6 % in dev. With many more, -1 or "-" is a class, or the file is a
# test set.
UNLABELLED_FRACTION = 0.1
_is_score = re.compile(r"\s*[+-]?(\d*\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+)\s*").fullmatch


@dataclass(frozen=True)
class ClassificationConditions(TaskConditions):
    """Conditions with the number of classes, and the dev accuracy of always predicting the most frequent class."""

    classes: int
    majority_accuracy: float

    def described(self) -> str:
        return (
            f"{super().described()}, {self.classes} classes; always predicting the most frequent class gives "
            f"{100 * self.majority_accuracy:.1f} %"
        )


@dataclass(frozen=True)
class JsonLinesClassification(Task):
    """A folder with ``train.jsonl`` and ``dev.jsonl``.

    Attributes:
        labels: the classes of the training examples, sorted; an example's label is an index into ``labels``.
        unlabelled: number of examples left out, by file name.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    labels: tuple[Label, ...]
    unlabelled: Mapping[str, int]

    metrics = ("accuracy",)

    @classmethod
    def is_named(cls, name: str) -> bool:
        return (Path(name) / "train.jsonl").exists()

    @classmethod
    def read(cls, name: str) -> Self:
        """Read ``train.jsonl`` and ``dev.jsonl`` of the folder ``name``.

        Raises:
            UserError: a file is missing, empty or not JSON lines; a field is missing or has a wrong type; a label is a
                score; the two files have different fields or types of labels; too many examples are unlabelled; there
                are fewer than two classes; dev has a class that is not in train.
        """
        folder = Path(name)
        files = read_records(folder, _check_label)
        labelled = {file: _labelled(records, folder / file) for file, records in files.items()}
        labels = _classes(folder, *labelled.values())
        classes = {label: index for index, label in enumerate(labels)}
        train, dev = (
            tuple(example_of(record, classes[record["label"]]) for record in records)
            for records in labelled.values()
        )
        unlabelled = {file: len(records) - len(labelled[file]) for file, records in files.items()}
        return cls(folder.resolve().name, train, dev, labels, unlabelled)

    @property
    def head(self) -> Head:
        labels = tuple(map(str, self.labels))
        return Head(AutoModelForSequenceClassification, len(labels), "single_label_classification", labels)

    def features(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        return encode(examples, tokenizer, max_length)

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        """Return the accuracy: the share of examples whose class has the highest logit."""
        answers = torch.stack(predictions["logits"]).argmax(dim=-1)
        labels = torch.tensor([feature["labels"] for feature in features])
        return {"accuracy": int((answers == labels).sum()) / len(labels)}

    def conditions(self, fine_tuning: FineTuning) -> ClassificationConditions:
        general = super().conditions(fine_tuning)
        return ClassificationConditions(
            **vars(general), classes=len(self.labels), majority_accuracy=self.majority_accuracy
        )

    @property
    def majority_accuracy(self) -> float:
        """Accuracy on dev of always predicting its most frequent class."""
        return max(Counter(example.label for example in self.dev).values()) / len(self.dev)

    def warnings(self) -> list[str]:
        return [
            f"{count:,} examples in {file} of the task {self.name} are unlabelled (-1 or -) and left out"
            for file, count in self.unlabelled.items()
            if count
        ]


def _labelled(records: Sequence[Record], path: Path) -> list[Record]:
    labelled = [record for record in records if record["label"] not in UNLABELLED]
    left_out = [record["label"] for record in records if record["label"] in UNLABELLED]
    if len(left_out) > UNLABELLED_FRACTION * len(records):
        raise UserError(
            "bad-task",
            f"{len(left_out):,} of {len(records):,} examples in {path} have the label {json.dumps(left_out[0])}, which "
            "marks unlabelled examples in SNLI and GLUE; remove them, or rename the class",
        )
    return labelled


def _classes(folder: Path, train: Sequence[Record], dev: Sequence[Record]) -> tuple[Label, ...]:
    one_of_kind = {type(record["label"]): record["label"] for record in (*train, *dev)}
    if len(one_of_kind) > 1:
        kinds = " and ".join(map(json.dumps, one_of_kind.values()))
        raise UserError(
            "bad-task",
            f"the task {folder} mixes labels of different types ({kinds}); use only integers or only strings",
        )
    labels = tuple(sorted({record["label"] for record in train}))
    if len(labels) < 2:
        raise UserError(
            "bad-task",
            f"all training examples of the task {folder} have the label {labels[0]!r}; give at least two classes",
        )
    unknown = sorted({str(record["label"]) for record in dev}.difference(map(str, labels)))
    if unknown:
        raise UserError(
            "bad-task",
            f"dev.jsonl of the task {folder} has labels that are not in train.jsonl ({', '.join(unknown[:3])}); "
            "correct one of the files",
        )
    return labels


def _check_label(label: Any, where: str) -> None:
    if isinstance(label, float) or (isinstance(label, str) and _is_score(label)):
        raise UserError(
            "bad-task",
            f"{where} has the label {json.dumps(label)}, which is a score; for regression write every label as a "
            "number, else give classes as integers or names",
        )
    if not isinstance(label, Label) or label == "":
        raise UserError("bad-task", f'{where} needs an integer or a name as "label"; correct it')
