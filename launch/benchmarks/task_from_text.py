"""Make a task from text that tells models apart.

    python launch/benchmarks/task_from_text.py --kind punctuation --text a.txt --text b.txt.xz --output_dir tasks/marks

bigram_shift   were two neighbouring words of a sentence swapped? (Conneau et al. 2018)
               train.jsonl and dev.jsonl: sentences of 5 to 28 words, as in the paper; half are swapped (label 1). Only
               lower-case words without punctuation are swapped, because a comma or a capital letter in the wrong place
               would show it.
punctuation    which mark follows each word?
               train.txt and dev.txt in CoNLL's columns: passages of 20 to 60 lower-case words without marks, tagged
               B-COMMA (, ; :), B-PERIOD (. !), B-QUESTION (?) or O

The folder is for --task of launch/evaluate.py and launch/ablation.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distilspeed.trainer.corpus.sources import file_source
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, folder_written_whole, parents_made
from distilspeed.trainer.job.arguments import LARGEST_SEED, Settings, setting
from distilspeed.trainer.job.command import run_command

WORDS = range(5, 29)
SENTENCE_ENDS = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])")

SHORTEST_PASSAGE, LONGEST_PASSAGE = 20, 60
TAGS = {",": "B-COMMA", ";": "B-COMMA", ":": "B-COMMA", ".": "B-PERIOD", "!": "B-PERIOD", "?": "B-QUESTION"}
# A word keeps what it has inside ("don't", "house-renting", "1,000"), but no dash.
WORD_AND_MARKS = re.compile(r"(\w+(?:['’.-]\w+|,\d+)*)([^\w\s]*)")
# Their full stops end no sentence.
TITLES = frozenset({"mr", "mrs", "ms", "dr", "st", "messrs"})


@dataclass(frozen=True, kw_only=True)
class TaskArguments(Settings):
    """The command line of ``launch/benchmarks/task_from_text.py``."""

    kind: Literal["bigram_shift", "punctuation"] = setting(help="the question")
    text: tuple[Path, ...] = setting(
        (), action="append", metavar="FILE", help="text, one paragraph a line; repeat for more", required=True
    )
    output_dir: Path = setting(metavar="DIR", help="a new folder for the task")
    train_examples: int = setting(10_000, above=0, metavar="N", help="examples to train on")
    dev_examples: int = setting(1_000, above=0, metavar="N", help="examples to score")
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED, help="of the choice of examples and the swaps")


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(
        TaskArguments, prog="launch/benchmarks/task_from_text.py", description=__doc__
    ).parse()
    check_unoccupied(arguments.output_dir)
    documents = (text for path in arguments.text for text in file_source(path, "text").documents())
    if arguments.kind == "bigram_shift":
        suffix, examples = "jsonl", bigram_shift(documents, arguments)
    else:
        suffix, examples = "txt", punctuation(documents, arguments)
    with parents_made(arguments.output_dir), folder_written_whole(arguments.output_dir) as folder:
        for name, part in (
            ("train", examples[arguments.dev_examples :]),
            ("dev", examples[: arguments.dev_examples]),
        ):
            (folder / f"{name}.{suffix}").write_text("".join(part), encoding="utf-8")


def bigram_shift(documents: Iterator[str], arguments: TaskArguments) -> list[str]:
    """Return different sentences in random order as lines of JSON, every second one with two words swapped.

    Raises:
        UserError: a file cannot be read, or the text has too few sentences.
    """
    generator = np.random.default_rng(arguments.seed)
    sentences = (sentence for document in documents for sentence in swappable_sentences(document))
    chosen = _chosen(sentences, arguments, generator)
    examples = (
        {"text": swapped(sentence, generator) if number % 2 else sentence, "label": number % 2}
        for number, sentence in enumerate(chosen)
    )
    return [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]


def punctuation(documents: Iterator[str], arguments: TaskArguments) -> list[str]:
    """Return different passages in random order, one tagged word a line, a blank line at the end.

    Raises:
        UserError: a file cannot be read, or the text has too few passages.
    """
    passages = (passage for document in documents for passage in tagged_passages(document))
    return _chosen(passages, arguments, np.random.default_rng(arguments.seed))


def _chosen(found: Iterator[str], arguments: TaskArguments, generator: np.random.Generator) -> list[str]:
    """Choose as many different texts as the arguments say, in random order."""
    every = list(dict.fromkeys(found))
    wanted = arguments.train_examples + arguments.dev_examples
    if len(every) < wanted:
        raise UserError(
            "no-text",
            f"the text has {len(every):,} usable examples, and {wanted:,} are wanted; give more --text, or "
            "lower --train_examples and --dev_examples",
        )
    return [every[place] for place in generator.permutation(len(every))[:wanted]]


def swappable_sentences(document: str) -> Iterator[str]:
    """Yield the sentences of 5 to 28 words in which two words can be swapped."""
    for sentence in SENTENCE_ENDS.split(document):
        words = sentence.split()
        if len(words) in WORDS and places(words):
            yield " ".join(words)


def places(words: Sequence[str]) -> list[int]:
    """Return the index of each word that can be swapped with the next."""
    plain = [word.isalpha() and word.islower() for word in words]
    return [
        place
        for place in range(len(words) - 1)
        if plain[place] and plain[place + 1] and words[place] != words[place + 1]
    ]


def swapped(sentence: str, generator: np.random.Generator) -> str:
    """Return the sentence with two neighbouring words swapped."""
    words = sentence.split()
    place = generator.choice(places(words))
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)


def tagged_passages(document: str) -> Iterator[str]:
    """Yield runs of 20 to 60 words with their tags, as lines of CoNLL's columns."""
    words = WORD_AND_MARKS.findall(document.replace("_", ""))  # which marks italics
    for begin in range(0, len(words), LONGEST_PASSAGE):
        passage = words[begin : begin + LONGEST_PASSAGE]
        if len(passage) >= SHORTEST_PASSAGE:
            yield "".join(f"{word.lower()} {_tag(word, marks)}\n" for word, marks in passage) + "\n"


def _tag(word: str, marks: str) -> str:
    mark = next((mark for mark in marks if mark in TAGS), "")
    return "O" if mark == "." and word.lower() in TITLES else TAGS.get(mark, "O")


if __name__ == "__main__":
    run_command(main)
