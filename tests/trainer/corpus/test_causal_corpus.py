"""A tokenizer like GPT-2's makes a causal corpus: documents between <|endoftext|>, cut into pieces."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from families import gpt2_tokenizer
from transformers import BertTokenizer, PreTrainedTokenizerFast
from user_errors import raises_user_error

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import Corpus, load_tokenizer, open_corpus, read_rows
from distilspeed.trainer.corpus.merge import merge_shards
from distilspeed.trainer.corpus.packing import MINIMUM_PIECE_TOKENS
from distilspeed.trainer.corpus.shard import Shard

LENGTH = 32
Pieces = Callable[[datasets.Dataset], list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def tokenizer(reference_text: Path) -> PreTrainedTokenizerFast:
    return gpt2_tokenizer(reference_text.read_text(encoding="utf-8").splitlines())


@pytest.fixture
def causal(tokenizer: PreTrainedTokenizerFast, some_text: Path, tmp_path: Path) -> CorpusArguments:
    with some_text.open("a", encoding="utf-8") as file:
        file.write(
            "\nThis document names <|endoftext|> and many other words, so that it is long enough to be kept.\n"
        )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return CorpusArguments(
        text=(some_text,),
        tokenizer=str(tmp_path / "tokenizer"),
        seq_length=LENGTH,
        output_dir=tmp_path / "corpus",
        held_out_fraction=0.1,
        num_proc=1,
    )


def expected_pieces(text: Path, tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, ...]]:
    end = tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    pieces = []
    for line in text.read_text(encoding="utf-8").splitlines():
        ids = [end, *backend.encode(line, add_special_tokens=False).ids, end]
        pieces += [tuple(ids[start : start + LENGTH]) for start in range(0, len(ids), LENGTH)]
    return [piece for piece in pieces if len(piece) >= MINIMUM_PIECE_TOKENS]


def all_pieces(corpus: Corpus, pieces_of: Pieces) -> list[tuple[int, ...]]:
    return sorted(pieces_of(corpus.train) + pieces_of(corpus.held_out))


def test_documents_begin_and_end_with_the_end_token_and_are_cut_without_it(
    causal: CorpusArguments, tokenizer: PreTrainedTokenizerFast, pieces_of: Pieces
) -> None:
    corpus = prepare_corpus(causal)
    expected = expected_pieces(causal.text[0], tokenizer)
    assert all_pieces(corpus, pieces_of) == sorted(expected)
    end = tokenizer.eos_token_id
    assert any(end not in piece for piece in expected), "no document here is longer than two rows"


def test_the_manifest_says_that_the_corpus_is_causal(causal: CorpusArguments) -> None:
    corpus = prepare_corpus(causal)
    manifest = open_corpus(corpus.path, verify_checksums=True).manifest
    end = corpus.load_tokenizer().eos_token_id
    assert (manifest.objective, manifest.mask_id) == ("causal", None)
    assert {manifest.pad_id, manifest.cls_id, manifest.sep_id} == {end}
    rows = read_rows(corpus.train, range(len(corpus.train)))
    padding = [
        token
        for row, lengths in zip(rows.input_ids, rows.document_lengths, strict=True)
        for token in row[lengths.sum() :]
    ]
    assert set(padding) == {end}
    # Padding is not counted.
    assert corpus.token_counts.sum() == manifest.counts.train_tokens


def test_merged_shards_are_a_causal_corpus(
    causal: CorpusArguments, tmp_path: Path, pieces_of: Pieces
) -> None:
    def arguments(**changed: Any) -> CorpusArguments:
        return CorpusArguments(**{**vars(causal), **changed})

    shards = [
        prepare_corpus(arguments(shard=Shard(index, 2), output_dir=tmp_path / f"shard{index}")).path
        for index in (0, 1)
    ]
    merged = merge_shards(shards, tmp_path / "merged")
    assert merged.manifest.objective == "causal"
    assert all_pieces(merged, pieces_of) == all_pieces(prepare_corpus(causal), pieces_of)


def test_a_corpus_of_before_is_masked(small_corpus_dir: Path, tmp_path: Path) -> None:
    older = shutil.copytree(small_corpus_dir, tmp_path / "corpus")
    manifest = json.loads((small_corpus_dir / "manifest.json").read_text())
    assert manifest.pop("objective") == "masked"
    (older / "manifest.json").write_text(json.dumps(manifest))
    assert open_corpus(older).manifest == open_corpus(small_corpus_dir).manifest


def test_a_tokenizer_with_some_tokens_of_bert_still_needs_them_all(
    small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = BertTokenizer.from_pretrained(small_tokenizer_dir)
    tokenizer.mask_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    with raises_user_error("unusable-tokenizer", "mask token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_token_makes_no_corpus(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with raises_user_error("unusable-tokenizer", "cls, sep, mask token"):
        load_tokenizer(str(tmp_path))
