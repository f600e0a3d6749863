"""The corpus has the tokens of the model's own tokenizer, for every kind of tokenizer and text of any script."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from families import TINY_FAMILIES
from transformers import AutoTokenizer

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.corpus.packing import MINIMUM_PIECE_TOKENS

STRINGS = 2000
SEQ_LENGTH = 256
# First and last letter of each script's alphabet, or of a part of it.
SCRIPTS = (
    "az",
    "AZ",
    "àÿ",
    "ĀŽ",
    "αω",
    "ая",
    "АЯ",
    "את",
    "غي",
    "अह",
    "অহ",
    "กฮ",
    "ა\u10f0",
    "ሀፐ",
    "가힣",
    "ぁん",
    "一龥",
    "😀😿",
)
MARKS = (
    *" .,;:!?'\"()-",
    "\u0301",
    "\u200d",
    "\u00a0",
    "  ",
    "…",
    "—",
    "“",
    "。",
    "<mask>",
    "<s>",
    "</s>",
    "[MASK]",
    "<|endoftext|>",
)


def multilingual_strings() -> list[str]:
    """Return strings of words in mixed scripts, with punctuation, combining marks and names of special tokens."""
    chance = random.Random(0)

    def word() -> str:
        first, last = chance.choice(SCRIPTS)
        return "".join(chr(chance.randint(ord(first), ord(last))) for _ in range(chance.randint(1, 8)))

    return [
        "".join(
            word() + (chance.choice(MARKS) if chance.random() < 0.3 else " ")
            for _ in range(chance.randint(4, 12))
        )
        for _ in range(STRINGS)
    ]


@pytest.mark.parametrize("name", [name for name, tiny in TINY_FAMILIES.items() if tiny.tokenizer])
def test_the_corpus_has_the_tokens_of_the_models_own_tokenizer(
    name: str,
    family_dirs: Callable[[str], Any],
    pieces_of: Callable[[datasets.Dataset], list[tuple[int, ...]]],
    tmp_path: Path,
) -> None:
    strings = multilingual_strings()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(strings), encoding="utf-8")
    tokenizer_dir = family_dirs(name).teacher
    prepare_corpus(
        CorpusArguments(
            text=(text,),
            tokenizer=str(tokenizer_dir),
            seq_length=SEQ_LENGTH,
            output_dir=tmp_path / "corpus",
            num_proc=1,
        )
    )
    corpus = open_corpus(tmp_path / "corpus", verify_checksums=True)
    counts, manifest = corpus.manifest.counts, corpus.manifest

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    # transformers reads "<mask>" in a text as the token, and the corpus as text.
    tokenizer.backend_tokenizer.encode_special_tokens = True
    special = set(manifest.special_ids)
    expected = set()
    for string in strings:
        ids = tokenizer.backend_tokenizer.encode(string, add_special_tokens=False).ids
        ids = [manifest.unk_id if token in special else token for token in ids]
        piece = (manifest.cls_id, *ids, manifest.sep_id)
        assert len(piece) <= SEQ_LENGTH
        if len(piece) >= MINIMUM_PIECE_TOKENS and 2 * ids.count(manifest.unk_id) < len(piece):
            expected.add(piece)
    found = [piece for split in (corpus.train, corpus.held_out) for piece in pieces_of(split)]
    assert set(found) == expected
    assert counts.documents == STRINGS
    assert len(expected) > STRINGS / 4
