"""SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018), from the hub or from their own JSON files.

``--task squad`` and ``--task squad_v2`` are the hub's data sets; ``--task DIR`` is a folder with train-v1.1.json and
dev-v1.1.json, or the same with v2.0. A long context is cut into overlapping windows.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerFast

from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.evaluation.tasks.hub import load_split
from distilspeed.trainer.evaluation.tasks.task import Feature, FineTuning, Predictions, Scores, Task
from distilspeed.trainer.models.inputs import TOKENIZER_OUTPUTS
from distilspeed.trainer.models.loading import Head

STRIDE = 128  # tokens that a window shares with the one before
LONGEST_ANSWER = 30  # tokens
LONGEST_QUESTION = 64  # tokens, as in BERT; more are cut off
# Training examples whose answer is not at its place in the context; above this share the file is wrong.
MISPLACED_FRACTION = 0.01


class Version(NamedTuple):
    """A version of SQuAD: its name on the hub, the ends of its files' names, and the settings of Devlin et al. 2019."""

    hub: str
    file: str
    fine_tuning: FineTuning


VERSIONS = {
    "squad": Version("rajpurkar/squad", "v1.1.json", FineTuning(3, 5e-5, batch_size=32, max_length=384)),
    "squad_v2": Version(
        "rajpurkar/squad_v2", "v2.0.json", FineTuning(2, 5e-5, batch_size=48, max_length=384)
    ),
}


@dataclass(frozen=True)
class Question:
    """A question about a context.

    ``answers``: all accepted answers, none if the context has none. ``start``: the place of the first in the context,
    in characters.
    """

    question: str
    context: str
    answers: tuple[str, ...]
    start: int

    @property
    def is_in_place(self) -> bool:
        return not self.answers or (
            self.answers[0] != "" and self.context.startswith(self.answers[0], self.start)
        )


@dataclass(frozen=True)
class Squad(Task):
    """Question answering by a span of the context.

    Attributes:
        misplaced: number of training examples left out, because their answer is not at its place in the context.
    """

    train: tuple[Question, ...]
    dev: tuple[Question, ...]
    misplaced: int

    metrics = ("f1", "exact_match")

    @classmethod
    def is_named(cls, name: str) -> bool:
        return name in VERSIONS or _version_of(Path(name)) is not None

    @classmethod
    def read(cls, name: str) -> Self:
        """Read the hub's "squad" or "squad_v2", or a folder with SQuAD's files.

        Raises:
            UserError: the hub cannot be reached; a file is missing or is not SQuAD's; too many answers are not in
                their contexts.
        """
        if in_folder := _version_of(Path(name)):
            file = VERSIONS[in_folder].file
            train, dev = (tuple(_read_file(Path(name) / f"{part}-{file}")) for part in ("train", "dev"))
        else:
            train, dev = (tuple(_read_split(name, split)) for split in ("train", "validation"))
        if not (train and dev):
            raise UserError(
                "bad-task", f"the task {name} has no questions; a task needs training and dev questions"
            )
        kept = tuple(question for question in train if question.is_in_place)
        misplaced = len(train) - len(kept)
        if misplaced > MISPLACED_FRACTION * len(train):
            first = next(question for question in train if not question.is_in_place)
            raise UserError(
                "bad-task",
                f"{misplaced:,} of {len(train):,} training answers of the task {name} are not at their place in the "
                f"context, the first to the question {first.question!r}; correct answer_start",
            )
        return cls(in_folder or name, kept, dev, misplaced)

    @property
    def head(self) -> Head:
        return Head(AutoModelForQuestionAnswering, num_labels=2)

    @property
    def fine_tuning(self) -> FineTuning:
        return VERSIONS[self.name].fine_tuning

    def features(
        self, examples: Sequence[Question], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        """Tokenise each question with the windows of its context.

        A feature also has ``example`` (its index) and ``offsets`` (for each token its characters in the context, or
        None for other tokens). Without the answer in the window, both positions are 0, the first token.
        """
        # Beside the question and up to 4 special tokens, a window must have room for more than its stride.
        longest_question = max(1, min(LONGEST_QUESTION, max_length // 2 - 4))
        windows = tokenizer(
            [_cut(example.question.lstrip(), tokenizer, longest_question) for example in examples],
            [example.context for example in examples],
            truncation="only_second",
            max_length=max_length,
            stride=min(STRIDE, max_length // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        features = []
        for row, number in enumerate(windows["overflow_to_sample_mapping"]):
            in_context = [sequence == 1 for sequence in windows.sequence_ids(row)]
            offsets = windows["offset_mapping"][row]
            start, end = _answer_tokens(examples[number], windows[row])
            features.append(
                {name: windows[name][row] for name in TOKENIZER_OUTPUTS}
                | {"start_positions": start, "end_positions": end, "example": number}
                | {
                    "offsets": [
                        pair if here else None for pair, here in zip(offsets, in_context, strict=True)
                    ]
                }
            )
        return features

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        """Return F1 and exact match of the words, by torchmetrics; 1 is best.

        The answer is the span with the highest sum of logits over all windows. It is none if a question may have none
        and the first token has a higher sum in every window.
        """
        from torchmetrics.functional.text import squad

        may_be_none = any(not question.answers for question in self.dev)
        spans: dict[int, _Span] = {}
        nulls: dict[int, float] = {}
        for feature, start, end in zip(
            features, predictions["start_logits"], predictions["end_logits"], strict=True
        ):
            number = feature["example"]
            span = _best_span(feature["offsets"], start, end)
            spans[number] = max(spans.get(number, span), span)
            null = float(start[0] + end[0])
            nulls[number] = min(nulls.get(number, null), null)
        answers, wanted = list[Any](), list[Any]()
        for number, question in enumerate(self.dev):
            span = spans[number]
            is_none = may_be_none and nulls[number] > span.score
            text = "" if is_none else question.context[span.begin : span.end]
            answers.append({"id": str(number), "prediction_text": text})
            texts = list(question.answers) or [""]
            wanted.append({"id": str(number), "answers": {"text": texts, "answer_start": [0] * len(texts)}})
        found = squad(answers, wanted)
        return {"f1": found["f1"].item() / 100, "exact_match": found["exact_match"].item() / 100}

    def warnings(self) -> list[str]:
        if not self.misplaced:
            return []
        return [
            f"{self.misplaced:,} training examples of the task {self.name} are left out: "
            "their answer is not at its place in the context"
        ]


def _cut(text: str, tokenizer: PreTrainedTokenizerFast, longest: int) -> str:
    """Return the text up to its token number ``longest``."""
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(tokens) <= longest else text[: tokens[longest - 1][1]]


class _Span(NamedTuple):
    """The sum of a span's logits, and its characters in the context."""

    score: float
    begin: int
    end: int


def _best_span(offsets: Sequence[Any], start: torch.Tensor, end: torch.Tensor) -> _Span:
    """Return the best span of context tokens in a window; a window without context has a score of -infinity."""
    tokens = [token for token, characters in enumerate(offsets) if characters is not None]
    if not tokens:
        return _Span(float("-inf"), 0, 0)
    sums = start[tokens][:, None] + end[tokens][None, :]
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    best = int(sums.masked_fill(~allowed, float("-inf")).argmax())
    first, last = divmod(best, len(tokens))
    return _Span(float(sums[first, last]), offsets[tokens[first]][0], offsets[tokens[last]][1])


def _answer_tokens(question: Question, encoding: Any) -> tuple[int, int]:
    """Return the first and last token of the answer in a window; 0 and 0 if it is not wholly inside."""
    if not question.answers:
        return 0, 0
    end = question.start + len(question.answers[0]) - 1
    tokens = [encoding.char_to_token(place, sequence_index=1) for place in (question.start, end)]
    return (0, 0) if None in tokens else (tokens[0], tokens[1])


def _version_of(folder: Path) -> str | None:
    return next(
        (name for name, version in VERSIONS.items() if (folder / f"train-{version.file}").is_file()), None
    )


def _read_file(path: Path) -> Iterator[Question]:
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    # Questions without an answer have plausible ones under another name.
                    answers = [] if asked.get("is_impossible") else asked["answers"]
                    yield _question(asked["question"], paragraph["context"], answers)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            "bad-task", f"cannot read {path}: {reason}; give SQuAD's own train and dev files"
        ) from error


def _read_split(name: str, split: str) -> Iterator[Question]:
    rows = load_split(name, VERSIONS[name].hub, None, split, "give a folder with SQuAD's own files")
    for row in rows:
        answers = row["answers"]
        pairs = zip(answers["text"], answers["answer_start"], strict=True)
        yield _question(
            row["question"], row["context"], [{"text": text, "answer_start": start} for text, start in pairs]
        )


def _question(question: str, context: str, answers: Sequence[dict[str, Any]]) -> Question:
    """Return the question; spaces around an answer are not part of it, because no token has them."""
    texts = [str(answer["text"]) for answer in answers]
    start = int(answers[0]["answer_start"]) + len(texts[0]) - len(texts[0].lstrip()) if answers else 0
    return Question(question, context, tuple(text.strip() for text in texts), start)
