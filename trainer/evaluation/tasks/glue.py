"""The tasks of GLUE, from the hub or from GLUE's own TSV files.

``--task glue/mrpc`` is the hub's data set, ``--task DIR/MRPC`` a folder with train.tsv and dev.tsv. Test sets have no
labels and are not read. In the files a tab separates two fields, and quotation marks are part of the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.evaluation.tasks.glue_specs import GLUE_SPECS, GlueSpec
from distilspeed.trainer.evaluation.tasks.hub import load_split
from distilspeed.trainer.evaluation.tasks.names import GLUE_FOLDERS, GLUE_PREFIX
from distilspeed.trainer.evaluation.tasks.sentences import Example, encode
from distilspeed.trainer.evaluation.tasks.task import Feature, FineTuning, Predictions, Scores, Task
from distilspeed.trainer.models.loading import Head

HUB_DATASET = "nyu-mll/glue"
# QQP's train.tsv has a few lines that are not six fields; BERT's own script leaves them out, too.
MALFORMED_FRACTION = 0.001
HIGHEST_SCORE = 5.0  # of STS-B; the lowest is 0

_TASK_OF_FOLDER = {folder: task for task, folder in GLUE_FOLDERS.items()}


@dataclass(frozen=True)
class Glue(Task):
    """A task of GLUE.

    Attributes:
        dev: the examples of all dev sets, one set after the other.
        dev_sizes: number of examples in each dev set.
        malformed: number of lines that were left out, by file name.
    """

    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    spec: GlueSpec
    dev_sizes: tuple[int, ...]
    malformed: Mapping[str, int]

    @classmethod
    def is_named(cls, name: str) -> bool:
        is_on_hub = name.startswith(GLUE_PREFIX) and name.removeprefix(GLUE_PREFIX) in GLUE_SPECS
        return is_on_hub or Path(name).name in _TASK_OF_FOLDER

    @classmethod
    def read(cls, name: str) -> Self:
        """Read the hub's task "glue/mrpc", or the files of the folder "DIR/MRPC".

        Raises:
            UserError: the hub cannot be reached; a file or column is missing; lines have a wrong number of fields, or
                a label that is not the task's.
        """
        task = _TASK_OF_FOLDER.get(Path(name).name) or name.removeprefix(GLUE_PREFIX)
        spec = GLUE_SPECS[task]
        malformed: dict[str, int] = {}
        if Path(name).name in _TASK_OF_FOLDER:
            files = ["train.tsv", *(dev.file for dev in spec.dev_sets)]
            sets = [tuple(_read_file(Path(name) / file, spec, malformed)) for file in files]
        else:
            splits = ["train", *(dev.hub for dev in spec.dev_sets)]
            sets = [tuple(_read_split(task, split, spec)) for split in splits]
        train, *dev = sets
        together = tuple(example for dev_set in dev for example in dev_set)
        return cls(GLUE_PREFIX + task, train, together, spec, tuple(map(len, dev)), malformed)

    @property
    def head(self) -> Head:
        if not self.spec.classes:
            return Head(AutoModelForSequenceClassification, 1, "regression")
        labels = self.spec.names or self.spec.classes
        return Head(AutoModelForSequenceClassification, len(labels), "single_label_classification", labels)

    @property
    def fine_tuning(self) -> FineTuning:
        return FineTuning(self.spec.epochs, learning_rate=2e-5, batch_size=32, max_length=128)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(name + dev.suffix for dev in self.spec.dev_sets for name in self.spec.metrics)

    def features(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        return encode(examples, tokenizer, max_length)

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        logits = torch.stack(predictions["logits"])
        answers = (logits.argmax(dim=-1) if self.spec.classes else logits.squeeze(-1)).tolist()
        labels = [feature["labels"] for feature in features]
        scores, start = {}, 0
        for dev, size in zip(self.spec.dev_sets, self.dev_sizes, strict=True):
            of_set = slice(start, start + size)
            for name, metric in self.spec.metrics.items():
                scores[name + dev.suffix] = metric(labels[of_set], answers[of_set])
            start += size
        return scores

    def warnings(self) -> list[str]:
        return [
            f"{count:,} lines in {file} of the task {self.name} have a wrong number of fields and are left out"
            for file, count in self.malformed.items()
            if count
        ]


def _read_file(path: Path, spec: GlueSpec, malformed: dict[str, int]) -> Iterator[Example]:
    """Yield the examples of a TSV file, and count its malformed lines."""
    try:
        # Only \n ends a line: sentences contain other line separators of Unicode.
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "bad-task", f"cannot read {path}: {first_line(error)}; give a folder of GLUE's own files"
        ) from error
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    header, first = (spec.header, 1) if spec.header else (tuple(rows.pop(0)), 2)
    missing = [column for column in (*spec.sentences, spec.label) if column not in header]
    if missing:
        raise UserError(
            "bad-task", f"{path} has no column {missing[0]!r} in its first line; give GLUE's own file"
        )
    if not rows:
        raise UserError("bad-task", f"{path} has no examples; a task needs training and dev examples")
    bad = [number for number, row in enumerate(rows, start=first) if len(row) != len(header)]
    if len(bad) > MALFORMED_FRACTION * len(rows):
        raise UserError(
            "bad-task",
            f"{path}, line {bad[0]} has {len(rows[bad[0] - first])} fields, and the file has {len(header)} columns; "
            "correct the line",
        )
    malformed[path.name] = len(bad)
    *sentences, label = (header.index(column) for column in (*spec.sentences, spec.label))
    for number, row in enumerate(rows, start=first):
        if len(row) == len(header):
            value = _label(row[label], spec, f"{path}, line {number}")
            yield _example([row[place] for place in sentences], value)


def _read_split(task: str, split: str, spec: GlueSpec) -> Iterator[Example]:
    """Yield the examples of a split on the hub."""
    rows = load_split(GLUE_PREFIX + task, HUB_DATASET, task, split, "give GLUE's own files with --glue_dir")
    for number, row in enumerate(rows):
        label = row["label"]
        if spec.classes and label not in range(len(spec.classes)):
            raise UserError(
                "bad-task",
                f"example {number} of {GLUE_PREFIX}{task}, {split}, has the label {label!r}; "
                "give GLUE's own files with --glue_dir",
            )
        yield _example([row[column] for column in spec.hub_sentences], label)


def _label(text: str, spec: GlueSpec, where: str) -> int | float:
    if spec.classes:
        if text not in spec.classes:
            raise UserError(
                "bad-task",
                f"{where} has the label {text!r}; the task's labels are {', '.join(spec.classes)}",
            )
        return spec.classes.index(text)
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= HIGHEST_SCORE:
        raise UserError(
            "bad-task", f"{where} has the score {text!r}; the task's scores are from 0 to {HIGHEST_SCORE:g}"
        )
    return score


def _example(sentences: Sequence[str], label: int | float) -> Example:
    return Example(sentences[0], sentences[1] if len(sentences) > 1 else None, label)
