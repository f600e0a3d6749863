"""Make text, tokenizer and teacher config for launch/quickstart.sh, without a download.

The text is English prose from the Python language reference (``pydoc_data``) and from the docstrings of the
installed packages: one paragraph per line, without duplicates. The tokenizer is a WordPiece trained on this text.
"""

import inspect
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from distilspeed.trainer.files import check_unoccupied, folder_written_whole, parents_made
from distilspeed.trainer.job.arguments import Settings, setting
from distilspeed.trainer.job.command import run_command

VOCABULARY = 2048
SHORTEST_PARAGRAPH = 60  # characters
CODE_SHARE = 0.05  # highest share of a paragraph's characters that match CODE_CHARACTER
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
CODE_CHARACTER = re.compile(r"[^A-Za-z ,.;:'\"()\-]")
MARKUP = re.compile(r"[`*]+|:[a-z:]+:(?=`)")
# A tiny BERT that a CPU trains on a few million tokens in minutes.
TEACHER = {
    "model_type": "bert",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the triple-quoted strings of all Python files below a folder."""
    for path in sorted(folder.rglob("*.py")):
        for match in DOCSTRING.finditer(path.read_text(encoding="utf-8", errors="ignore")):
            yield inspect.cleandoc(match[1])


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of English prose, each as one line; code, tables and argument lists are dropped."""
    for paragraph in re.split(r"\n\s*\n", text):
        if "    " in paragraph.strip() or ">>>" in paragraph:
            continue
        line = " ".join(MARKUP.sub("", paragraph).split())
        long_enough, is_sentence = len(line) >= SHORTEST_PARAGRAPH, line[-1:] in tuple(".:!?")
        if long_enough and is_sentence and len(CODE_CHARACTER.findall(line)) <= CODE_SHARE * len(line):
            yield line


@dataclass(frozen=True, kw_only=True)
class QuickstartDataArguments(Settings):
    """The command line of ``launch/quickstart_data.py``."""

    output_dir: Path = setting(help="a new folder")
    seq_length: int = setting(128, at_least=16, help="maximum tokens per row")


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(
        QuickstartDataArguments, prog="launch/quickstart_data.py", description=__doc__
    ).parse()
    output_dir: Path = arguments.output_dir
    check_unoccupied(output_dir)
    with parents_made(output_dir), folder_written_whole(output_dir) as folder:
        summary = write_data(folder, arguments.seq_length)
    print(f"{output_dir}: {summary}")


def write_data(folder: Path, seq_length: int) -> str:
    """Write text.txt, tokenizer/ and teacher_config.json to a folder; return a summary of the text's size."""
    # After the parsing, because these take seconds.
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    texts = [*topics.values(), *docstrings(Path(sysconfig.get_path("purelib")))]
    # Without duplicates: a paragraph must not be in both training and held-out rows.
    paragraphs = list(dict.fromkeys(line for text in texts for line in prose_paragraphs(text)))
    (folder / "text.txt").write_text("\n".join(paragraphs) + "\n", encoding="utf-8")

    wordpiece = BertWordPieceTokenizer(lowercase=True)
    wordpiece.train_from_iterator(paragraphs, vocab_size=VOCABULARY, show_progress=False)
    wordpiece.save_model(str(folder))
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=seq_length)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = TEACHER | {"vocab_size": len(tokenizer), "max_position_embeddings": seq_length}
    (folder / "teacher_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    megabytes = sum(map(len, paragraphs)) / 1e6
    return f"{len(paragraphs):,} paragraphs of English prose, {megabytes:.1f} MB"


if __name__ == "__main__":
    run_command(main)
