"""SQuAD: files and hub data sets are read, answers are found in windows of long contexts, and scored as text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from user_errors import raises_user_error

from distilspeed.trainer.evaluation.fine_tuning import fine_tune
from distilspeed.trainer.evaluation.tasks import squad
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.squad import Question, Squad
from distilspeed.trainer.evaluation.tasks.task import FineTuning

pytestmark = pytest.mark.usefixtures("one_thread")

FILLER = ["if", "the", "name", "is", "not", "found", "in", "the", "module"]
CONTEXT = "The list is empty. A “class” has two methods."
MAX_LENGTH = 24


def asked(question: str, answers: Sequence[str], context: str = CONTEXT, **more: object) -> dict[str, Any]:
    places = [{"text": text, "answer_start": context.find(text)} for text in answers]
    return {"question": question, "id": question, "answers": places, **more}


def write_file(path: Path, questions: Sequence[dict[str, Any]], context: str = CONTEXT) -> None:
    paragraphs = [{"context": context, "qas": list(questions)}]
    path.write_text(json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]}))


def read(name: object) -> Squad:
    (task,) = read_tasks([str(name)])
    assert isinstance(task, Squad)
    return task


def test_version_1_is_read_from_its_own_files(tmp_path: Path) -> None:
    write_file(tmp_path / "train-v1.1.json", [asked("What is empty?", ["list"])])
    write_file(tmp_path / "dev-v1.1.json", [asked("What has methods?", ["“class”", "class", "A “class”"])])
    task = read(tmp_path)
    assert task.name == "squad"
    assert task.train == (Question("What is empty?", CONTEXT, ("list",), 4),)
    assert task.dev[0].answers == ("“class”", "class", "A “class”")
    assert (task.fine_tuning.epochs, task.fine_tuning.max_length) == (3, 384)


def test_version_2_has_questions_without_an_answer(tmp_path: Path) -> None:
    plausible = {"is_impossible": True, "plausible_answers": [{"text": "list", "answer_start": 4}]}
    questions = [
        asked("What is full?", [], **plausible),
        asked("What is empty?", ["list"], is_impossible=False),
    ]
    for part in ("train", "dev"):
        write_file(tmp_path / f"{part}-v2.0.json", questions)
    task = read(tmp_path)
    assert task.name == "squad_v2"
    assert [question.answers for question in task.dev] == [(), ("list",)]


@pytest.mark.parametrize("name", ["squad", "squad_v2"])
def test_the_hubs_data_set_gives_the_same_questions(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "question": "What is empty?",
            "context": CONTEXT,
            "answers": {"text": ["list"], "answer_start": [4]},
        },
        {"question": "What is full?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ][: 2 if name == "squad_v2" else 1]
    for split in ("train", "validation"):
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / f"{split}-00000-of-00001.parquet")
    version = squad.VERSIONS[name]._replace(hub=str(tmp_path / "hub"))
    monkeypatch.setitem(squad.VERSIONS, name, version)
    # In the user's cache, a folder of another test run may have the same name.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = read(name)
    assert task.train == task.dev
    expected = (Question("What is empty?", CONTEXT, ("list",), 4), Question("What is full?", CONTEXT, (), 0))
    assert task.train == expected[: len(rows)]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = [asked("What is empty?", ["list"])] * 200
    train, dev = tmp_path / "train-v1.1.json", tmp_path / "dev-v1.1.json"
    write_file(train, good)
    with raises_user_error("bad-task", str(dev)):
        read(tmp_path)
    dev.write_text("{")
    with raises_user_error("bad-task", str(dev)):
        read(tmp_path)
    dev.write_text('{"data": [{"paragraphs": [{"qas": [{"question": "?", "answers": []}]}]}]}')
    with raises_user_error("bad-task", "'context'", str(dev)):
        read(tmp_path)
    write_file(dev, good)
    misplaced = {"question": "Where?", "id": "x", "answers": [{"text": "list", "answer_start": 5}]}
    write_file(train, [*good, misplaced])
    task = read(tmp_path)
    assert (len(task.train), task.misplaced) == (200, 1)
    assert "1 training examples" in task.warnings()[0]
    write_file(train, [*good, *[misplaced] * 10])
    with raises_user_error("bad-task", "10 of 210", "Where?", "answer_start"):
        read(tmp_path)


def questions(count: int, seed: int, unanswerable: bool = False) -> tuple[Question, ...]:
    """Make questions with a context of at least two windows; the answer is the only word that is not filler.

    With ``unanswerable`` every other context has no answer.
    """
    draws = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        words = FILLER * (3 + number % 2)
        answer = ("list", "class", "object", "type")[number % 4]
        if unanswerable and number % 2:
            found.append(Question("which?", " ".join(words), (), 0))
            continue
        place = int(torch.randint(len(words), (1,), generator=draws))
        words.insert(place, answer)
        found.append(
            Question("which?", " ".join(words), (answer,), len(" ".join(words[:place])) + (place > 0))
        )
    assert all(question.is_in_place for question in found)
    return tuple(found)


@pytest.fixture
def tokenizer(small_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(small_tokenizer_dir)


def test_windows_cover_the_context_and_know_their_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    task = Squad("squad", questions(8, seed=0), questions(8, seed=1, unanswerable=True), 0)
    features = task.features(task.dev, tokenizer, MAX_LENGTH)
    assert max(len(feature["input_ids"]) for feature in features) == MAX_LENGTH
    for number, question in enumerate(task.dev):
        windows = [feature for feature in features if feature["example"] == number]
        assert len(windows) > 1
        seen = {place for window in windows for place in window["offsets"] if place is not None}
        assert sorted(begin for begin, _ in seen)[0] == 0
        assert max(end for _, end in seen) == len(question.context)
        answered = [window for window in windows if window["start_positions"]]
        assert bool(answered) == bool(question.answers)
        for window in answered:
            first, last = (window["offsets"][window[place]] for place in ("start_positions", "end_positions"))
            assert question.context[first[0] : last[1]] == question.answers[0]


def scores_of(
    task: Squad, tokenizer: PreTrainedTokenizerFast, answers: Sequence[str | None]
) -> dict[str, float]:
    """Score an answer from the context for each question, each in one window; None for no answer."""
    features = task.features(task.dev, tokenizer, 384)
    logits: dict[str, list[torch.Tensor]] = {"start_logits": [], "end_logits": []}
    for feature, question, answer in zip(features, task.dev, answers, strict=True):
        begin = 0 if answer is None else question.context.index(answer)
        places = [pair or (-1, -1) for pair in feature["offsets"]]
        first = 0 if answer is None else [start for start, _ in places].index(begin)
        last = 0 if answer is None else [end for _, end in places].index(begin + len(answer))
        for name, token in (("start_logits", first), ("end_logits", last)):
            logits[name].append(torch.eye(len(places))[token])
    return task.score(features, logits)


def test_scores_are_those_of_words_without_articles_and_punctuation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def task(*answers: str) -> Squad:
        return Squad("squad", (), (Question("what?", "the list class is a type", answers, 0),), 0)

    right, wrong = {"f1": 1.0, "exact_match": 1.0}, {"f1": 0.0, "exact_match": 0.0}
    assert scores_of(task("list class"), tokenizer, ["the list class"]) == right
    assert scores_of(task("The List, class!"), tokenizer, ["list class"]) == right
    assert scores_of(task("type", "list class"), tokenizer, ["list class"]) == right
    half = scores_of(task("list"), tokenizer, ["list class"])
    assert half == {"f1": pytest.approx(2 / 3), "exact_match": 0}
    assert scores_of(task("type"), tokenizer, ["list class"]) == wrong


def test_no_answer_counts_only_where_questions_may_have_none(tokenizer: PreTrainedTokenizerFast) -> None:
    context = "the list class is a type"
    with_answer, without = Question("what?", context, ("list",), 4), Question("what?", context, (), 0)
    both = Squad("squad_v2", (), (with_answer, without), 0)
    assert scores_of(both, tokenizer, ["list", None]) == {"f1": 1.0, "exact_match": 1.0}
    assert scores_of(both, tokenizer, [None, "list"]) == {"f1": 0.0, "exact_match": 0.0}
    # In version 1 the best span of the context is the answer, even if the first token has a higher sum.
    question = Question("what?", "list class", ("list",), 0)
    assert scores_of(Squad("squad", (), (question,), 0), tokenizer, [None])["exact_match"] == 1


def test_an_answer_is_no_span_that_ends_before_it_starts_or_is_too_long() -> None:
    offsets = [None, *((token, token + 1) for token in range(60))]

    def best(first: int, last: int) -> squad._Span:
        start, end = torch.zeros(61), torch.zeros(61)
        start[first], end[last] = 5.0, 5.0
        return squad._best_span(offsets, start, end)

    assert best(10, 40 - 1) == (10.0, 9, 39)
    assert best(10, 40).score == 5.0, "31 tokens"
    assert best(40, 10).score == 5.0
    start = end = torch.zeros(2)
    assert squad._best_span([None, None], start, end).score == float("-inf")


@pytest.mark.parametrize("version", ["squad", "squad_v2"])
def test_a_model_learns_to_answer(
    tiny_teacher_dir: Path, tokenizer: PreTrainedTokenizerFast, version: str
) -> None:
    task = Squad(
        version, questions(160, 0, version == "squad_v2"), questions(40, 1, version == "squad_v2"), 0
    )
    settings = FineTuning(epochs=10, learning_rate=2e-3, batch_size=16, max_length=MAX_LENGTH)
    scores = fine_tune(str(tiny_teacher_dir), task, tokenizer, settings, seed=0, device=torch.device("cpu"))
    assert scores["exact_match"] > 0.85


def test_spaces_around_an_answer_are_not_part_of_it(tmp_path: Path, small_tokenizer_dir: Path) -> None:
    for part in ("train", "dev"):
        write_file(tmp_path / f"{part}-v1.1.json", [asked("What is empty?", [" list "])])
    task = read(tmp_path)
    assert task.train == (Question("What is empty?", CONTEXT, ("list",), 4),)
    (feature,) = task.features(task.train, AutoTokenizer.from_pretrained(small_tokenizer_dir), 64)
    assert feature["start_positions"] > 0


@pytest.mark.parametrize("max_length", [8, 16, 32, 128, 384])
def test_a_long_question_is_cut_and_leaves_room_for_the_context(
    small_tokenizer_dir: Path, max_length: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    question = Question("name " * 500, "the list " * 300, ("list",), 4)
    task = Squad("squad", (question,), (question,), 0)
    features = task.features(task.train, tokenizer, max_length)
    questions = {sum(offset is None for offset in feature["offsets"]) - 3 for feature in features[:-1]}
    assert questions == {max(1, min(64, max_length // 2 - 4))}
    assert sum(offset is not None for feature in features for offset in feature["offsets"]) >= 600


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train-v1.1.json").write_text('{"data": []}')
    write_file(tmp_path / "dev-v1.1.json", [asked("What is empty?", ["list"])])
    with raises_user_error("bad-task", str(tmp_path), "no questions"):
        read(tmp_path)
