"""Merge the shards of a corpus: copy their rows in shard order, without tokenising again."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from distilspeed.trainer.corpus.format import Corpus, CorpusCounts, Manifest, open_corpus
from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.corpus.writer import SplitWriter, finish_corpus, installed_versions, row_rules
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, folder_written_whole, parents_made

# Manifest fields that are equal in all shards of a corpus.
COMMON_FIELDS = ("tokenizer_hash", "seq_length", "sources", "document_separator", "objective", "versions")


def merge_shards(shard_dirs: Sequence[Path], output_dir: Path) -> Corpus:
    """Merge all shards of a corpus, given in any order; the same shards give the same bytes.

    Rows keep their split. The checksums of every shard are verified first.
    Raises ``UserError`` for shards that are missing, repeated, damaged, or of different corpora.
    """
    check_unoccupied(output_dir)
    shards = [open_corpus(folder, verify_checksums=True) for folder in shard_dirs]
    _check_belong_together(shards)
    shards.sort(key=lambda shard: shard.manifest.shard.index)
    with parents_made(output_dir), folder_written_whole(output_dir) as folder:
        _write_merged(folder, shards)
    return open_corpus(output_dir)


def _check_belong_together(shards: Sequence[Corpus]) -> None:
    first = shards[0]
    count = first.manifest.shard.count
    by_shard: dict[Shard, Corpus] = {}
    for corpus in shards:
        shard = corpus.manifest.shard
        if shard == WHOLE:
            raise UserError("shard-mismatch", f"{corpus.path} is a whole corpus, not a shard; leave it out")
        if shard.count != count:
            raise UserError(
                "shard-mismatch",
                f"{first.path} is one of {count} shards, and {corpus.path} is one of {shard.count}; "
                "merge shards of the same corpus",
            )
        if shard in by_shard:
            raise UserError(
                "shard-mismatch",
                f"{by_shard[shard].path} and {corpus.path} are both shard {shard}; leave out one",
            )
        by_shard[shard] = corpus
        for name in COMMON_FIELDS:
            ours, theirs = getattr(first.manifest, name), getattr(corpus.manifest, name)
            if ours != theirs:
                raise UserError(
                    "shard-mismatch",
                    f"{first.path} and {corpus.path} differ in {name}: {_shown(first.manifest, name)} and "
                    f"{_shown(corpus.manifest, name)}; merge shards made with the same arguments",
                )
    missing = [str(shard) for index in range(count) if (shard := Shard(index, count)) not in by_shard]
    if missing:
        raise UserError(
            "shard-mismatch",
            f"shard {', '.join(missing)} is missing; prepare it and give all {count} folders",
        )
    if first.manifest.versions != installed_versions():
        raise UserError(
            "shard-mismatch",
            f"{first.path} was prepared with other package versions than those installed; "
            "install the versions in its manifest.json",
        )


def _shown(manifest: Manifest, name: str) -> str:
    value = asdict(manifest)[name]
    return ", ".join(source["name"] for source in value) if name == "sources" else str(value)


def _write_merged(folder: Path, shards: Sequence[Corpus]) -> None:
    manifest = shards[0].manifest
    tokenizer = shards[0].load_tokenizer()
    rules = row_rules(tokenizer, manifest.seq_length)
    for split in ("train", "held_out"):
        writer = SplitWriter(folder / split, rules)
        for shard in shards:
            # Not memory-mapped: mapped pages count towards the memory of this process.
            with pa.OSFile(str(shard.path / split / "data.arrow")) as file:
                for batch in pa.ipc.open_stream(file):
                    writer.write(batch)
        writer.close()
    parts = [asdict(shard.manifest.counts) for shard in shards]
    finish_corpus(
        folder,
        tokenizer,
        manifest.seq_length,
        manifest.sources,
        manifest.document_separator,
        WHOLE,
        CorpusCounts(**{name: sum(part[name] for part in parts) for name in parts[0]}),
        sum(shard.token_counts for shard in shards[1:]) + shards[0].token_counts,
    )
