"""Shards and the corpus they merge to."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from distilspeed.trainer.corpus import WHOLE, Corpus, Shard, load_tokenizer, open_corpus
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.merging import merge_shards
from distilspeed.trainer.preparation import CorpusArguments, prepare_corpus

SHARDS = 3
PiecesOf = Callable[[datasets.Dataset], list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def arguments(
    small_corpus_dir: Path, small_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> CorpusArguments:
    """The small corpus's text and what it was prepared with, for shards of it."""
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


def test_the_shards_hold_every_piece_of_the_text_once(
    corpus: Corpus, merged: Corpus, pieces_of: PiecesOf
) -> None:
    for prepared in (corpus, merged):
        assert prepared.manifest.shard == WHOLE
    whole = Counter(pieces_of(corpus.train) + pieces_of(corpus.held_out))
    assert Counter(pieces_of(merged.train) + pieces_of(merged.held_out)) == whole
    for name in ("documents", "pieces", "dropped_short", "dropped_unknown"):
        assert getattr(merged.manifest.counts, name) == getattr(corpus.manifest.counts, name)
    assert merged.manifest.sources == corpus.manifest.sources


def test_rows_keep_their_split_and_follow_the_shards(shard_dirs: list[Path], merged: Corpus) -> None:
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


def check_refused(folders: list[Path], message: str, tmp_path: Path) -> None:
    output_dir = tmp_path / "out" / "merged"
    with pytest.raises(UserError, match=message):
        merge_shards(folders, output_dir)
    assert not output_dir.parent.exists()


def test_missing_repeated_and_whole_ones_are_refused(
    shard_dirs: list[Path], small_corpus_dir: Path, tmp_path: Path
) -> None:
    check_refused(shard_dirs[1:2], "shard 0/3, 2/3 is missing", tmp_path)
    check_refused([*shard_dirs, shard_dirs[1]], "are both shard 1/3", tmp_path)
    check_refused([*shard_dirs, small_corpus_dir], "is no shard but a whole corpus", tmp_path)
    check_refused([*shard_dirs, tmp_path / "nowhere"], "nowhere is not a prepared corpus", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 32}, "differ in seq_length: 64 and 32"),
        ({"shard": Shard(2, 4)}, "one of 3 shards and .* one of 4"),
        ({"tokenizer": "other"}, "differ in tokenizer_hash"),
        ({"text": "more"}, "differ in sources: reference.txt and reference.txt, reference.txt"),
    ],
)
def test_shards_of_different_corpora_are_refused(
    arguments: CorpusArguments,
    shard_dirs: list[Path],
    tmp_path: Path,
    changes: dict[str, object],
    message: str,
) -> None:
    if changes == {"tokenizer": "other"}:
        other = tmp_path / "other"
        tokenizer = load_tokenizer(arguments.tokenizer)
        tokenizer.add_tokens(["distilspeed"])
        tokenizer.save_pretrained(other)
        changes = {"tokenizer": str(other)}
    elif changes == {"text": "more"}:
        changes = {"text": arguments.text * 2}
    stray = replace(arguments, shard=Shard(2, SHARDS), output_dir=tmp_path / "stray")
    prepare_corpus(replace(stray, **changes))
    check_refused([*shard_dirs[:2], tmp_path / "stray"], message, tmp_path)


def test_a_damaged_shard_is_refused(shard_dirs: list[Path], tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(shard_dirs[2], tmp_path / "damaged"))
    file = damaged / "train" / "data.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    check_refused([*shard_dirs[:2], damaged], "content of train/data.arrow has changed", tmp_path)


def test_shards_of_other_versions_are_refused(shard_dirs: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in shard_dirs]
    for copy in copies:
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["versions"]["tokenizers"] = "0.1"
        (copy / "manifest.json").write_text(json.dumps(manifest))
    check_refused(copies, "prepared with other versions", tmp_path)


def test_a_corpus_from_before_there_were_shards_opens(small_corpus_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_corpus_dir, tmp_path / "old"))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["shard"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert open_corpus(copy).manifest.shard == WHOLE
