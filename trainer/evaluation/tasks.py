"""Tasks to fine-tune on: sentence or sentence-pair classification from two JSON-lines files.

train.jsonl, dev.jsonl   objects with ``label`` and either ``text`` or ``text_a`` and ``text_b``

A label is a class: an integer, a string or a boolean, one kind throughout. Examples that are labelled as SNLI and GLUE
label what has no label (-1, "-") are left out and counted.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_linear_schedule_with_warmup,
)

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.models.loading import load_classifier

Label = int | str  # bool is an int to Python
Encoded = dict[str, Any]  # one example: what the tokenizer gives, and "label"
Record = dict[str, Any]  # one line of a file

# datasets gives the unlabelled examples of SNLI, and GLUE's test sets, the label -1; SNLI's own files have "-".
UNLABELLED = (-1, "-1", "-")
# SNLI has 0.1 % in train and 1.6 % in dev. Where there are more, -1 or "-" is a class, or the file a test set.
UNLABELLED_FRACTION = 0.1
_is_score = re.compile(r"\s*[+-]?(\d*\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+)\s*").fullmatch

# Devlin et al. 2019 fine-tune BERT with these.
WARMUP_FRACTION = 0.1
WEIGHT_DECAY = 0.01
GRADIENT_CLIPPING = 1.0


@dataclass(frozen=True)
class Example:
    """A sentence, or a pair of them, and its class (an index into the task's ``labels``)."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class Task:
    """A classification task; ``labels`` are the classes of the training examples, sorted.

    ``unlabelled``: examples that were left out, by the name of their file.
    """

    name: str
    labels: tuple[Label, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    unlabelled: Mapping[str, int]

    @property
    def majority_accuracy(self) -> float:
        """Accuracy on dev of always answering its most frequent class."""
        return max(Counter(example.label for example in self.dev).values()) / len(self.dev)


@dataclass(frozen=True)
class FineTuning:
    """How each model is fine-tuned; ``max_length`` in tokens, longer examples are cut."""

    epochs: int
    learning_rate: float
    batch_size: int
    max_length: int


def read_task(folder: Path) -> Task:
    """Read ``train.jsonl`` and ``dev.jsonl`` of a task.

    Raises:
        UserError: a file is missing, empty or not JSON lines; a field is missing or of another type; a label is a
            score; the two files do not have the same fields, or labels of one kind; more examples are unlabelled
            than can be by chance; there are fewer than two classes, or dev has one that train lacks.
    """
    files = {name: _read_records(folder / name) for name in ("train.jsonl", "dev.jsonl")}
    fields = {_text_fields(record) for records in files.values() for record in records}
    if len(fields) > 1:
        raise UserError(
            "bad-task",
            f'the task {folder} mixes "text" with "text_a", "text_b"; use one of the two throughout',
        )
    labelled = {name: _labelled(records, folder / name) for name, records in files.items()}
    labels = _classes(folder, *labelled.values())
    classes = {label: index for index, label in enumerate(labels)}
    (text_fields,) = fields
    train, dev = (
        tuple(_example(record, text_fields, classes) for record in records) for records in labelled.values()
    )
    unlabelled = {name: len(records) - len(labelled[name]) for name, records in files.items()}
    return Task(folder.resolve().name, labels, train, dev, unlabelled)


def _labelled(records: Sequence[Record], path: Path) -> list[Record]:
    labelled = [record for record in records if record["label"] not in UNLABELLED]
    left_out = [record["label"] for record in records if record["label"] in UNLABELLED]
    if len(left_out) > UNLABELLED_FRACTION * len(records):
        raise UserError(
            "bad-task",
            f"{len(left_out):,} of {len(records):,} examples in {path} have the label {json.dumps(left_out[0])}, which "
            "SNLI and GLUE give to unlabelled ones; remove them, or name the class otherwise",
        )
    return labelled


def _classes(folder: Path, train: Sequence[Record], dev: Sequence[Record]) -> tuple[Label, ...]:
    one_of_kind = {type(record["label"]): record["label"] for record in (*train, *dev)}
    if len(one_of_kind) > 1:
        kinds = " and ".join(map(json.dumps, one_of_kind.values()))
        raise UserError(
            "bad-task",
            f"the task {folder} mixes labels of different kinds ({kinds}); use integers or strings throughout",
        )
    labels = tuple(sorted({record["label"] for record in train}))
    if len(labels) < 2:
        raise UserError(
            "bad-task",
            f"all training examples of the task {folder} have the label {labels[0]!r}; give two or more",
        )
    unknown = sorted({str(record["label"]) for record in dev}.difference(map(str, labels)))
    if unknown:
        raise UserError(
            "bad-task",
            f"dev.jsonl of the task {folder} has labels that train.jsonl lacks ({', '.join(unknown[:3])}); correct it",
        )
    return labels


def _read_records(path: Path) -> list[Record]:
    try:
        with path.open(encoding="utf-8") as file:
            records = [_parse(line, f"{path}, line {number}") for number, line in enumerate(file, start=1)]
    except OSError as error:
        raise UserError(
            "bad-task",
            f"cannot read {path}: {error.strerror}; a task is a folder with train.jsonl and dev.jsonl",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError("bad-task", f"{path} is not UTF-8; convert it to UTF-8") from error
    if not records:
        raise UserError("bad-task", f"{path} is empty; a task needs examples to train and to test on")
    return records


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError("bad-task", f"{where} is not JSON: {error}; a task has one object a line") from error
    if not isinstance(record, dict):
        raise UserError("bad-task", f"{where} is not an object; a task has one object a line")
    texts, label = [record.get(field) for field in _text_fields(record)], record.get("label")
    if isinstance(label, float) or (isinstance(label, str) and _is_score(label)):
        raise UserError(
            "bad-task",
            f"{where} has the label {json.dumps(label)}, a score, and tasks are classifications (regression is not "
            "supported); give classes, as integers or names",
        )
    if not all(isinstance(text, str) for text in texts) or not isinstance(label, Label) or label == "":
        raise UserError(
            "bad-task",
            f'{where} needs "text", or "text_a" and "text_b", as strings and "label" as integer or name; correct it',
        )
    return record


def _text_fields(record: Record) -> tuple[str, ...]:
    return ("text",) if "text" in record else ("text_a", "text_b")


def _example(record: Record, text_fields: tuple[str, ...], classes: dict[Label, int]) -> Example:
    # JSON can spell half of a surrogate pair ("\ud83d"), which is no character and cannot be tokenised.
    texts = [record[field].encode("utf-8", "replace").decode() for field in text_fields]
    text, pair = (*texts, None)[:2]
    return Example(text, pair, classes[record["label"]])


def fine_tune(
    model_name: str,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    settings: FineTuning,
    seed: int,
    device: torch.device,
) -> float:
    """Fine-tune a pre-trained model on a task, in float32, and return its accuracy on dev after the last epoch.

    AdamW, 10 % linear warm-up then linear decay to 0, gradient clipping 1. The seed decides the new
    classification head, the dropout and the order of the examples.

    Args:
        model_name: a folder or hub id; weights in safetensors.
    """
    torch.manual_seed(seed)
    model = nn.Module.to(load_classifier(model_name, len(task.labels)), device)
    collate = DataCollatorWithPadding(tokenizer)
    train, dev = (
        encode(examples, tokenizer, model, settings.max_length) for examples in (task.train, task.dev)
    )
    batches: DataLoader[Any] = DataLoader(train, settings.batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    steps = settings.epochs * len(batches)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP_FRACTION * steps), steps)

    model.train()
    for _ in range(settings.epochs):
        for batch in batches:
            model(**batch.to(device)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIPPING)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return accuracy(model, DataLoader(dev, settings.batch_size, collate_fn=collate))  # type: ignore[arg-type]


def encode(
    examples: tuple[Example, ...], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, max_length: int
) -> list[Encoded]:
    """Token ids and class of each example, without the inputs that the model does not take (token types)."""
    pairs = [example.pair for example in examples if example.pair is not None]
    encoded = tokenizer(
        [example.text for example in examples],
        pairs or None,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,  # whatever model the tokenizer was saved with
    )
    accepted = [key for key in encoded if key in inspect.signature(model.forward).parameters]
    return [
        {key: encoded[key][index] for key in accepted} | {"label": example.label}
        for index, example in enumerate(examples)
    ]


@torch.inference_mode()
def accuracy(model: PreTrainedModel, batches: DataLoader[Any]) -> float:
    """Share of the examples whose class gets the highest logit; leaves the model in evaluation mode."""
    model.eval()
    correct = total = 0
    for batch in batches:
        inputs = batch.to(model.device)
        hits = model(**inputs).logits.argmax(dim=-1) == inputs["labels"]
        correct += int(hits.sum())
        total += len(hits)
    return correct / total
