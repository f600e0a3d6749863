"""Token classification: column files are read, every word is tagged once, and entities are scored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from user_errors import raises_user_error

from distilspeed.trainer.evaluation.fine_tuning import fine_tune
from distilspeed.trainer.evaluation.tasks.conll import Conll, Sentence
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.task import FineTuning

pytestmark = pytest.mark.usefixtures("one_thread")


def write_task(folder: Path, train: str, dev: str) -> Path:
    (folder / "train.txt").write_text(train, encoding="utf-8")
    (folder / "dev.txt").write_text(dev, encoding="utf-8")
    return folder


def read(folder: Path) -> Conll:
    (task,) = read_tasks([str(folder)])
    assert isinstance(task, Conll)
    return task


def test_sentences_are_read_with_the_first_and_last_column(tmp_path: Path) -> None:
    task = read(
        write_task(tmp_path, "-DOCSTART- O\n\nEU N B-ORG\nrejects V O\n\n\nPeter N B-PER\n", "EU\tN\tO")
    )
    assert task.train == (Sentence(("EU", "rejects"), ("B-ORG", "O")), Sentence(("Peter",), ("B-PER",)))
    assert task.dev == (Sentence(("EU",), ("O",)),)
    assert task.tags == ("B-ORG", "B-PER", "O")
    assert task.name == tmp_path.name


@pytest.mark.parametrize(
    ("train", "dev", "named"),
    [
        ("EU B-ORG\nrejects O O\n", "EU O", "train.txt, line 2"),
        ("EU\n", "EU O", "train.txt, line 1"),
        ("EU B-ORG\n", "EU B-PER", "B-PER"),
        ("EU B-ORG\n", "\n-DOCSTART- O\n", "dev.txt"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, train: str, dev: str, named: str) -> None:
    with raises_user_error("bad-task", named):
        read(write_task(tmp_path, train, dev))
    (tmp_path / "dev.txt").unlink()
    (tmp_path / "train.txt").write_text("EU B-ORG\n")
    with raises_user_error("bad-task", str(tmp_path / "dev.txt")):
        read(tmp_path)


def task_of(*sentences: str) -> Conll:
    """Make a task from sentences such as "the/O list/B-X"."""
    dev = tuple(
        Sentence(*zip(*(word.split("/") for word in sentence.split()), strict=True)) for sentence in sentences
    )
    return Conll("words", dev, dev, tuple(sorted({tag for sentence in dev for tag in sentence.tags})))


@pytest.mark.parametrize("name", ["wordpiece", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("max_length", [64, 8])
def test_every_word_is_tagged_once_at_its_first_token(
    small_tokenizer_dir: Path, family_dirs: Callable[[str], Any], name: str, max_length: int
) -> None:
    folder = small_tokenizer_dir if name == "wordpiece" else family_dirs(name).teacher
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = task_of("Unpronounceable/B-X words/I-X here/O ,/O there/B-Y", "the/O list/B-X " + "name/O " * 20)
    features = task.features(task.dev, tokenizer, max_length)
    assert (len(features) > 2) == (max_length == 8)
    tagged = [
        (feature["sentence"], word, task.tags[label], tokenizer.decode([token]).strip().lower())
        for feature in features
        for word, label, token in zip(feature["words"], feature["labels"], feature["input_ids"], strict=True)
        if word is not None
    ]
    expected = [
        (number, word, sentence.tags[word])
        for number, sentence in enumerate(task.dev)
        for word in range(len(sentence.words))
    ]
    assert [entry[:3] for entry in tagged] == expected
    for number, word, _, token in tagged:
        assert task.dev[number].words[word].lower().startswith(token.lstrip("\u2581"))


def test_an_entity_counts_if_words_and_type_are_right(small_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    task = task_of("the/B-X list/I-X is/O a/B-Y type/O")

    def scores(*tags: str) -> dict[str, float]:
        (feature,) = task.features(task.dev, tokenizer, 64)
        logits = torch.zeros(len(feature["words"]) + 3, len(task.tags))  # padded, as in a batch
        for token, word in enumerate(feature["words"]):
            if word is not None:
                logits[token, task.tags.index(tags[word])] = 1
        return task.score([feature], {"logits": [logits]})

    assert scores("B-X", "I-X", "O", "B-Y", "O") == {"f1": 1, "precision": 1, "recall": 1}
    assert scores("B-X", "I-X", "O", "B-X", "O") == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert scores("B-X", "O", "O", "B-Y", "O") == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert scores("B-X", "I-X", "O", "O", "O") == {"f1": pytest.approx(2 / 3), "precision": 1, "recall": 0.5}
    assert scores("O", "O", "O", "O", "O") == {"f1": 0, "precision": 0, "recall": 0}


@pytest.fixture
def tokenizer(small_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(small_tokenizer_dir)


def test_a_model_learns_to_tag(tiny_teacher_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    words = ("list/B-X name/I-X", "class/B-Y value/I-Y", "object/B-X", "type/B-Y")
    sentences = [f"the/O {words[i % 4]} of/O {i}/O" for i in range(120)]
    whole = task_of(*sentences)
    task = Conll("words", whole.train[:90], whole.dev[90:], whole.tags)
    settings = FineTuning(epochs=8, learning_rate=2e-3, batch_size=16, max_length=24)
    scores = fine_tune(str(tiny_teacher_dir), task, tokenizer, settings, seed=0, device=torch.device("cpu"))
    assert scores["f1"] > 0.9


def test_a_byte_order_mark_and_a_no_break_space_are_read_as_meant(tmp_path: Path) -> None:
    task = read(write_task(tmp_path, "\ufeff-DOCSTART- O\n\n10\u00a0000 N O\r\nEU \tN\tB-ORG\r\n", "EU N O"))
    assert task.train == (Sentence(("10\u00a0000", "EU"), ("O", "B-ORG")),)
