"""launch/benchmarks/task_from_text.py: swapped words, and missing punctuation."""

import lzma
import re
from pathlib import Path
from typing import Any

import pytest
from launcher import ROOT, python

from distilspeed.trainer.evaluation.tasks.registry import read_tasks

COMMAND = ROOT / "launch" / "benchmarks" / "task_from_text.py"
BOOKS = ROOT / "launch" / "quickstart" / "held_out_books.txt.xz"
SIZES = ("--train_examples", 600, "--dev_examples", 200)


def make_task(kind: str, folder: Path, seed: int) -> Any:
    done = python(COMMAND, "--kind", kind, "--text", BOOKS, "--output_dir", folder, *SIZES, "--seed", seed)
    assert done.returncode == 0, done.stderr
    (task,) = read_tasks([str(folder)])
    assert (len(task.train), len(task.dev)) == (600, 200)
    return task


def test_two_neighbouring_words_of_every_second_sentence_are_swapped(tmp_path: Path) -> None:
    task = make_task("bigram_shift", tmp_path / "task", 0)
    for part in (task.train, task.dev):
        assert [sum(example.label == label for example in part) for label in (0, 1)] == [len(part) / 2] * 2

    text = " ".join(lzma.decompress(BOOKS.read_bytes()).decode().split())
    shuffled = set()
    for example in (*task.train, *task.dev):
        words = example.text.split()
        assert 5 <= len(words) <= 28
        shuffled.add(tuple(sorted(words)))
        undone = [
            [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            for place in range(len(words) - 1)
            if all(word.isalpha() and word.islower() for word in words[place : place + 2])
        ]
        assert (example.text in text) == (example.label == 0)
        assert any(" ".join(original) in text for original in undone) or example.label == 0
    assert len(shuffled) == 800, "no sentence is there twice, also not in train and dev"


def test_words_have_the_marks_that_follow_them_in_the_text(tmp_path: Path) -> None:
    task = make_task("punctuation", tmp_path / "task", 0)
    passages = [*task.train, *task.dev]
    assert len({passage.words for passage in passages}) == 800, "no passage is there twice"
    assert all(20 <= len(passage.words) <= 60 for passage in passages)
    assert task.tags == ("B-COMMA", "B-PERIOD", "B-QUESTION", "O")
    text = lzma.decompress(BOOKS.read_bytes()).decode().lower()
    for passage in passages:
        for word, tag in zip(passage.words, passage.tags, strict=True):
            assert word.islower() or not any(letter.isalpha() for letter in word)
            assert word not in {"mr", "mrs"} or tag != "B-PERIOD"
    marks = {"B-COMMA": "[,;:]", "B-PERIOD": "[.!]", "B-QUESTION": "[?]", "O": ""}
    for passage in passages[:100]:
        pairs = zip(passage.words, passage.tags, strict=True)
        parts = [re.escape(word) + r"(?:_|[^\w\s])*?" + marks[tag] for word, tag in pairs]
        assert re.search(r"[\W_]+".join(parts), text), passage


@pytest.mark.parametrize("kind", ["bigram_shift", "punctuation"])
def test_the_seed_determines_the_task(tmp_path: Path, kind: str) -> None:
    first, again, other = (
        make_task(kind, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (first.train, first.dev) == (again.train, again.dev)
    assert first.train != other.train
    assert first.dev != other.dev
