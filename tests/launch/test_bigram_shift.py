"""launch/benchmarks/bigram_shift.py: every second sentence has two neighbouring words swapped."""

import json
import lzma
from pathlib import Path
from typing import Any

from launcher import ROOT, python

from distilspeed.trainer.evaluation.tasks.registry import read_tasks

COMMAND = ROOT / "launch" / "benchmarks" / "bigram_shift.py"
BOOKS = ROOT / "launch" / "quickstart" / "held_out_books.txt.xz"


def make_task(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Return the examples of train.jsonl and dev.jsonl."""
    options = ("--train_examples", 600, "--dev_examples", 200, "--seed", seed)
    done = python(COMMAND, "--text", BOOKS, "--output_dir", folder, *options)
    assert done.returncode == 0, done.stderr
    files = (folder / "train.jsonl", folder / "dev.jsonl")
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_two_neighbouring_words_of_every_second_sentence_are_swapped(tmp_path: Path) -> None:
    examples = make_task(tmp_path / "task", 0)
    (task,) = read_tasks([str(tmp_path / "task")])
    for part, count in ((task.train, 600), (task.dev, 200)):
        assert [sum(example.label == label for example in part) for label in (0, 1)] == [count / 2] * 2

    text = " ".join(lzma.decompress(BOOKS.read_bytes()).decode().split())
    shuffled = set()
    for example in examples:
        words = example["text"].split()
        assert 5 <= len(words) <= 28
        shuffled.add(tuple(sorted(words)))
        undone = [
            [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
            for place in range(len(words) - 1)
            if all(word.isalpha() and word.islower() for word in words[place : place + 2])
        ]
        assert (example["text"] in text) == (example["label"] == 0)
        assert any(" ".join(original) in text for original in undone) or example["label"] == 0
    assert len(shuffled) == len(examples), "no sentence is there twice, also not in train and dev"


def test_the_seed_determines_the_task(tmp_path: Path) -> None:
    first, again, other = (make_task(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again != other
