"""Token classification, such as named entities, from CoNLL's column files.

train.txt, dev.txt   one word a line: the word first, its tag last, columns separated by spaces or tabs; sentences are
                     separated by blank lines, and lines that begin with -DOCSTART- are skipped

Tags follow IOB ("B-PER", "I-PER", "O"); an entity counts if its words and its type are right.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
)

from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.evaluation.tasks.task import Feature, Predictions, Scores, Task
from distilspeed.trainer.models.inputs import TOKENIZER_OUTPUTS
from distilspeed.trainer.models.loading import Head

DOCUMENT_START = "-DOCSTART-"


@dataclass(frozen=True)
class Sentence:
    """Words and their tags."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Conll(Task):
    """A folder with ``train.txt`` and ``dev.txt``.

    Attributes:
        tags: the tags of the training sentences, sorted.
    """

    train: tuple[Sentence, ...]
    dev: tuple[Sentence, ...]
    tags: tuple[str, ...]

    metrics = ("f1", "precision", "recall")

    @classmethod
    def is_named(cls, name: str) -> bool:
        return (Path(name) / "train.txt").is_file()

    @classmethod
    def read(cls, name: str) -> Self:
        """Read the folder ``name``.

        Raises:
            UserError: a file cannot be read or has no sentences; a line has another number of columns than the first;
                dev has a tag that is not in train.
        """
        folder = Path(name)
        train, dev = (tuple(_read_sentences(folder / file)) for file in ("train.txt", "dev.txt"))
        tags = tuple(sorted({tag for sentence in train for tag in sentence.tags}))
        unknown = sorted({tag for sentence in dev for tag in sentence.tags}.difference(tags))
        if unknown:
            raise UserError(
                "bad-task",
                f"dev.txt of the task {folder} has tags that are not in train.txt ({', '.join(unknown[:3])}); "
                "correct one of the files",
            )
        return cls(folder.resolve().name, train, dev, tags)

    @property
    def head(self) -> Head:
        return Head(AutoModelForTokenClassification, len(self.tags), labels=self.tags)

    def features(
        self, examples: Sequence[Sentence], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        """Tokenise each sentence, in several windows if it is long.

        The first token of each word has the word's tag. ``sentence`` and ``words`` say which words these are.
        """
        # Words joined by spaces, because not every tokenizer takes lists of words.
        windows = tokenizer(
            [" ".join(example.words) for example in examples],
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        numbers = {tag: number for number, tag in enumerate(self.tags)}
        word_at = [_word_at(example.words) for example in examples]
        tagged: set[tuple[int, int]] = set()
        features = []
        for row, number in enumerate(windows["overflow_to_sample_mapping"]):
            labels, words = [], []
            for begin, end in windows["offset_mapping"][row]:
                # A token may begin with the space before its word; special tokens are empty.
                word = word_at[number].get(end - 1) if end > begin else None
                is_first = word is not None and (number, word) not in tagged
                words.append(word if is_first else None)
                labels.append(
                    numbers[examples[number].tags[word]] if is_first and word is not None else IGNORE_INDEX
                )
                if word is not None:
                    tagged.add((number, word))
            features.append(
                {name: windows[name][row] for name in TOKENIZER_OUTPUTS}
                | {"labels": labels, "sentence": number, "words": words}
            )
        return features

    def collator(self, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[Feature]], Mapping[str, Any]]:
        return DataCollatorForTokenClassification(tokenizer)

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        """Return F1, precision and recall of the entities, by seqeval; a word without tokens is predicted as "O"."""
        from seqeval.metrics import f1_score, precision_score, recall_score

        found = [["O"] * len(sentence.words) for sentence in self.dev]
        for feature, logits in zip(features, predictions["logits"], strict=True):
            best = logits.argmax(dim=-1).tolist()
            for word, tag in zip(feature["words"], best, strict=False):  # the batch may be longer
                if word is not None:
                    found[feature["sentence"]][word] = self.tags[tag]
        wanted = [list(sentence.tags) for sentence in self.dev]
        return {
            "f1": float(f1_score(wanted, found, zero_division=0)),
            "precision": float(precision_score(wanted, found, zero_division=0)),
            "recall": float(recall_score(wanted, found, zero_division=0)),
        }


def _word_at(words: Sequence[str]) -> dict[int, int]:
    """Return the word's number for each character of the words joined by spaces."""
    numbers: dict[int, int] = {}
    begin = 0
    for number, word in enumerate(words):
        numbers.update(dict.fromkeys(range(begin, begin + len(word)), number))
        begin += len(word) + 1
    return numbers


def _read_sentences(path: Path) -> Iterator[Sentence]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "bad-task", f"cannot read {path}: {first_line(error)}; a task has a train.txt and a dev.txt"
        ) from error
    columns: int | None = None
    words: list[tuple[str, str]] = []
    is_empty = True
    for number, line in enumerate([*lines, ""], start=1):
        # A no-break space is part of a word.
        parts = [part for part in re.split(r"[ \t\r]+", line) if part]
        if parts and parts[0] != DOCUMENT_START:
            columns = columns or len(parts)
            if len(parts) != columns or columns < 2:
                raise UserError(
                    "bad-task",
                    f"{path}, line {number} has {len(parts)} columns; every line needs a word, a tag last, and as many "
                    "columns as the first line",
                )
            words.append((parts[0], parts[-1]))
        elif words:
            yield Sentence(*zip(*words, strict=True))
            is_empty, words = False, []
    if is_empty:
        raise UserError("bad-task", f"{path} has no sentences; a task needs training and dev sentences")
