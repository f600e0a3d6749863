"""Merging shards into a corpus."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.corpus.merge import merge_shards
from distilspeed.trainer.corpus.shard import WHOLE, Shard

SHARDS = 3
PiecesOf = Callable[[datasets.Dataset], list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def arguments(
    small_corpus_dir: Path, small_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> CorpusArguments:
    """The text and settings of the small corpus, to prepare shards of it."""
    return CorpusArguments(
        text=(small_corpus_dir.parent / "reference.txt",),
        tokenizer=str(small_tokenizer_dir),
        seq_length=64,
        held_out_fraction=0.1,
        num_proc=1,
        output_dir=tmp_path_factory.mktemp("shards") / "shard",
    )


@pytest.fixture(scope="module")
def shard_dirs(arguments: CorpusArguments) -> list[Path]:
    folders = [arguments.output_dir.with_name(str(index)) for index in range(SHARDS)]
    for index, folder in enumerate(folders):
        prepare_corpus(replace(arguments, shard=Shard(index, SHARDS), output_dir=folder))
    return folders


@pytest.fixture(scope="module")
def merged(shard_dirs: list[Path]) -> Corpus:
    merge_shards([shard_dirs[1], shard_dirs[2], shard_dirs[0]], shard_dirs[0].with_name("merged"))
    return open_corpus(shard_dirs[0].with_name("merged"), verify_checksums=True)


def test_the_merged_shards_contain_every_piece_of_the_text_once(
    corpus: Corpus, merged: Corpus, pieces_of: PiecesOf
) -> None:
    for prepared in (corpus, merged):
        assert prepared.manifest.shard == WHOLE
    whole = Counter(pieces_of(corpus.train) + pieces_of(corpus.held_out))
    assert Counter(pieces_of(merged.train) + pieces_of(merged.held_out)) == whole
    for name in ("documents", "pieces", "dropped_short", "dropped_unknown"):
        assert getattr(merged.manifest.counts, name) == getattr(corpus.manifest.counts, name)
    assert merged.manifest.sources == corpus.manifest.sources


def test_rows_keep_their_split_and_the_order_of_the_shards(shard_dirs: list[Path], merged: Corpus) -> None:
    shards = [open_corpus(folder) for folder in shard_dirs]
    assert [shard.manifest.shard for shard in shards] == [Shard(index, SHARDS) for index in range(SHARDS)]
    for split in ("train", "held_out"):
        rows = [row for shard in shards for row in getattr(shard, split)]
        assert list(getattr(merged, split)) == rows
        tokens = sum(row["real_tokens"] for row in rows)
        assert getattr(merged.manifest.counts, f"{split}_rows") == len(rows)
        assert getattr(merged.manifest.counts, f"{split}_tokens") == tokens


def test_token_counts_add_up(merged: Corpus, pieces_of: PiecesOf) -> None:
    counted = Counter(token for piece in pieces_of(merged.train) for token in piece)
    assert {token: count for token, count in enumerate(merged.token_counts) if count} == counted
    assert merged.token_counts.dtype == np.int64


def test_a_corpus_of_an_earlier_version_opens(small_corpus_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_corpus_dir, tmp_path / "old"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["shard"], manifest["document_separator"]
    del manifest["counts"]["dropped_null"], manifest["counts"]["dropped_blank"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    opened = open_corpus(copy).manifest
    assert (opened.shard, opened.document_separator) == (WHOLE, "line")
    assert opened.counts == open_corpus(small_corpus_dir).manifest.counts
