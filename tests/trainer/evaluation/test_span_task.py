"""The task protocol supports a task unlike classification: text spans in long contexts, split into windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerFast

from distilspeed.trainer.evaluation.fine_tuning import fine_tune
from distilspeed.trainer.evaluation.tasks.task import Feature, FineTuning, Predictions, Scores, Task
from distilspeed.trainer.models.loading import Head

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = FineTuning(epochs=8, learning_rate=2e-3, batch_size=16, max_length=24)
STRIDE = 6
FILLER = ["if", "the", "name", "is", "not", "found", "in", "the", "module"]


@dataclass(frozen=True)
class Question:
    question: str
    context: str
    answer: str


@dataclass(frozen=True)
class Spans(Task):
    metrics = ("exact_match",)
    head = Head(AutoModelForQuestionAnswering, num_labels=2)

    @classmethod
    def is_named(cls, name: str) -> bool:
        return False

    @classmethod
    def read(cls, name: str) -> "Spans":
        return cls(name, questions(160, seed=0), questions(40, seed=1))

    def features(
        self, examples: Sequence[Question], tokenizer: PreTrainedTokenizerFast, max_length: int
    ) -> list[Feature]:
        windows = tokenizer(
            [example.question for example in examples],
            [example.context for example in examples],
            truncation="only_second",
            max_length=max_length,
            stride=STRIDE,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        features = []
        for row, number in enumerate(windows["overflow_to_sample_mapping"]):
            example, encoding = examples[number], windows[row]
            begin = example.context.index(example.answer)
            first = encoding.char_to_token(begin, sequence_index=1)
            last = encoding.char_to_token(begin + len(example.answer) - 1, sequence_index=1)
            is_inside = first is not None and last is not None
            features.append(
                {key: windows[key][row] for key in ("input_ids", "attention_mask", "token_type_ids")}
                | {"start_positions": first if is_inside else 0, "end_positions": last if is_inside else 0}
                | {"example": number, "offsets": windows["offset_mapping"][row]}
            )
        return features

    def score(self, features: Sequence[Feature], predictions: Predictions) -> Scores:
        best: dict[int, tuple[float, str]] = {}
        starts, ends = predictions["start_logits"], predictions["end_logits"]
        for feature, start, end in zip(features, starts, ends, strict=True):
            context = self.dev[feature["example"]].context
            in_context = torch.tensor(feature["token_type_ids"]).nonzero().flatten()[:-1]
            first, last = (in_context[of_tokens[in_context].argmax()] for of_tokens in (start, end))
            text = context[feature["offsets"][first][0] : feature["offsets"][last][1]]
            answer = (float(start[first] - start[0] + end[last] - end[0]), text)
            best[feature["example"]] = max(best.get(feature["example"], answer), answer)
        hits = [best[number][1] == question.answer for number, question in enumerate(self.dev)]
        return {"exact_match": sum(hits) / len(hits)}


def questions(count: int, seed: int) -> list[Question]:
    """Make questions with a context of at least two windows; the answer is the only word that is not filler."""
    draws = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        words = FILLER * (3 + number % 2)
        answer = ("list", "class", "object", "type")[number % 4]
        words.insert(int(torch.randint(len(words), (1,), generator=draws)), answer)
        found.append(Question("which?", " ".join(words), answer))
    return found


def test_answers_are_found_in_windows_and_scored_as_text(
    tiny_teacher_dir: Path, small_tokenizer_dir: Path
) -> None:
    task = Spans.read("spans")
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    features = task.features(task.dev, tokenizer, SETTINGS.max_length)
    with_answer = {feature["example"] for feature in features if feature["start_positions"]}
    assert with_answer == set(range(len(task.dev)))
    assert len(features) > 2 * len(task.dev)
    scores = fine_tune(str(tiny_teacher_dir), task, tokenizer, SETTINGS, seed=0, device=torch.device("cpu"))
    assert scores["exact_match"] > 0.9
