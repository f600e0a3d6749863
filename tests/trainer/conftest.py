"""Text, arguments and a reader of pieces for the tests of how a corpus is made."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.format import Corpus, open_corpus, read_rows


@pytest.fixture(scope="session")
def pieces_of() -> Callable[[datasets.Dataset], list[tuple[int, ...]]]:
    """Every piece of a split, cut at the boundaries on record."""

    def pieces(split: datasets.Dataset) -> list[tuple[int, ...]]:
        rows = read_rows(split, np.arange(len(split)))
        return [
            tuple(piece.tolist())
            for row, lengths in zip(rows.input_ids, rows.document_lengths, strict=True)
            for piece in np.split(row, np.cumsum(lengths))[:-1]
        ]

    return pieces


@pytest.fixture(scope="session")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir, verify_checksums=True)


@pytest.fixture
def some_text(reference_text: Path, tmp_path: Path) -> Path:
    """A hundred paragraphs, the file alone in its folder."""
    folder = tmp_path / "text"
    folder.mkdir()
    path = folder / "some.txt"
    path.write_text(
        "\n".join(reference_text.read_text(encoding="utf-8").splitlines()[:100]), encoding="utf-8"
    )
    return path


@pytest.fixture
def arguments(some_text: Path, small_tokenizer_dir: Path, tmp_path: Path) -> CorpusArguments:
    return CorpusArguments(
        tokenizer=str(small_tokenizer_dir),
        text=(some_text,),
        output_dir=tmp_path / "out" / "corpus",
        seq_length=64,
        held_out_fraction=0.1,
        num_proc=1,
    )
