"""Make a task from text: were two neighbouring words of a sentence swapped? (bigram shift, Conneau et al. 2018)

    python launch/benchmarks/bigram_shift.py --text a.txt --text b.txt.xz --output_dir tasks/bigram_shift

Half of the sentences are swapped (label 1). The folder is for --task of launch/evaluate.py and launch/ablation.py.
Sentences have 5 to 28 words, as in the paper. Only lower-case words without punctuation are swapped, because a comma
or a capital letter in the wrong place would show it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distilspeed.trainer.corpus.sources import file_source
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, folder_written_whole, parents_made
from distilspeed.trainer.job.arguments import LARGEST_SEED, Settings, setting
from distilspeed.trainer.job.command import run_command

WORDS = range(5, 29)
SENTENCE_ENDS = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z])")


@dataclass(frozen=True, kw_only=True)
class BigramShiftArguments(Settings):
    """The command line of ``launch/benchmarks/bigram_shift.py``."""

    text: tuple[Path, ...] = setting(
        (), action="append", metavar="FILE", help="text, one paragraph a line; repeat for more", required=True
    )
    output_dir: Path = setting(metavar="DIR", help="a new folder for train.jsonl and dev.jsonl")
    train_examples: int = setting(10_000, above=0, metavar="N", help="sentences in train.jsonl")
    dev_examples: int = setting(1_000, above=0, metavar="N", help="sentences in dev.jsonl")
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED, help="of the sentences and the swaps")


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(
        BigramShiftArguments, prog="launch/benchmarks/bigram_shift.py", description=__doc__
    ).parse()
    check_unoccupied(arguments.output_dir)
    examples = make_examples(arguments)
    with parents_made(arguments.output_dir), folder_written_whole(arguments.output_dir) as folder:
        for name, part in (
            ("train", examples[arguments.dev_examples :]),
            ("dev", examples[: arguments.dev_examples]),
        ):
            lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in part)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def make_examples(arguments: BigramShiftArguments) -> list[dict[str, object]]:
    """Return different sentences in random order, every second one with two words swapped.

    Raises:
        UserError: a file cannot be read, or the text has too few sentences.
    """
    documents = (text for path in arguments.text for text in file_source(path, "text").documents())
    sentences = {sentence: None for document in documents for sentence in swappable_sentences(document)}
    wanted = arguments.train_examples + arguments.dev_examples
    if len(sentences) < wanted:
        raise UserError(
            "no-text",
            f"the text has {len(sentences):,} usable sentences, and {wanted:,} are wanted; give more --text, or "
            "lower --train_examples and --dev_examples",
        )
    generator = np.random.default_rng(arguments.seed)
    chosen = generator.permutation(len(sentences))[:wanted]
    every = list(sentences)
    return [
        {"text": swapped(every[place], generator) if number % 2 else every[place], "label": number % 2}
        for number, place in enumerate(chosen)
    ]


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


if __name__ == "__main__":
    run_command(main)
