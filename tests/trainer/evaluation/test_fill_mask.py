"""Most probable tokens for a mask: those of transformers' pipeline; unsuitable texts are refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForMaskedLM, pipeline
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.evaluation.fill_mask import check_texts, fill_mask


@pytest.mark.parametrize("family", ["modernbert", "roberta"])
def test_they_are_those_of_transformers_pipeline(family_dirs: Callable[[str], Any], family: str) -> None:
    folders = family_dirs(family)
    tokenizer = open_corpus(folders.corpus).load_tokenizer()
    model = AutoModelForMaskedLM.from_pretrained(folders.teacher)
    texts = [f"the {tokenizer.mask_token} of the value", f"{tokenizer.mask_token} is returned"]
    filler = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=3, device="cpu")
    for ours, theirs in zip(fill_mask(model, tokenizer, texts), filler(texts), strict=True):
        assert [guess.token for guess in ours] == [found["token_str"].strip() for found in theirs]
        assert [guess.probability for guess in ours] == pytest.approx([found["score"] for found in theirs])


def test_a_token_of_white_space_is_shown_as_in_the_vocabulary(family_dirs: Callable[[str], Any]) -> None:
    folders = family_dirs("roberta")
    tokenizer = open_corpus(folders.corpus).load_tokenizer()
    model = AutoModelForMaskedLM.from_pretrained(folders.teacher)
    nn.init.zeros_(model.lm_head.decoder.weight)
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("Ġ")] = 9.0
    [(first, *_)] = fill_mask(model, tokenizer, [f"the {tokenizer.mask_token}"])
    assert first.token == "Ġ"


def test_texts_need_one_mask_and_room(small_corpus_dir: Path) -> None:
    corpus = open_corpus(small_corpus_dir)
    check_texts(["the [MASK] of"], corpus, positions=16)
    for text, found in (
        ("no mask", "0 masks"),
        ("[MASK] and [MASK]", "2 masks"),
        ("[MASK] of" + " the" * 20, "tokens"),
    ):
        with raises_user_error("bad-argument", "--fill_mask", found, "at most 16 tokens"):
            check_texts([text], corpus, positions=16)
    with raises_user_error("bad-argument", "--fill_mask", "not UTF-8"):
        check_texts([os.fsdecode(b"\xff [MASK]")], corpus, positions=16)


def test_a_causal_corpus_has_no_mask(family_dirs: Callable[[str], Any]) -> None:
    corpus = open_corpus(family_dirs("gpt2").corpus)
    with raises_user_error("conflicting-arguments", "--fill_mask", "causal"):
        check_texts(["the [MASK] of"], corpus, positions=16)
