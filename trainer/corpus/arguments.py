"""The command line of ``launch/prepare_data.py``."""

import os
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.arguments import Settings, setting

Separator = Literal["line", "blank_line"]


def _available_cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class CorpusArguments(Settings):
    """What to prepare (documents of ``text``, then of ``dataset``), or which shards to merge."""

    text: tuple[Path, ...] = setting(
        (),
        metavar="FILE",
        help="text, JSON lines, JSON array or Parquet, detected by content; may be compressed (gzip, bzip2, xz, zstd)",
    )
    dataset: tuple[str, ...] = setting(
        (),
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="hub dataset or local dataset folder; the split defaults to train; repeat to mix",
    )
    tokenizer: str = setting("", metavar="ID_OR_DIR", help="the teacher's tokenizer: a hub id or a folder")
    seq_length: int = setting(512, help="tokens per row")
    output_dir: Path = setting(metavar="DIR", help="created by this command")
    num_proc: int = setting(
        default_factory=_available_cores,
        at_least=1,
        metavar="N",
        help="number of tokenising processes (default: available cores)",
    )
    text_column: str = setting("text", help="the field that holds the text")
    document_separator: Separator = setting(
        "line", help="in plain text, a document is one line, or the lines between blank lines"
    )
    held_out_fraction: float = setting(0.01, above=0, below=0.5, help="fraction of rows kept for evaluation")
    shard: Shard = setting(
        WHOLE,
        parse=Shard.parse,
        metavar="I/N",
        help="prepare part I, counted from 0, of N equal parts of every source (default: everything)",
    )
    resume: bool = setting(False, help="resume a build that was stopped or killed, if there is one")
    merge: tuple[Path, ...] = setting((), metavar="DIR", help="merge all shards of a corpus")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge:
            self._check_nothing_else()
            return
        if not self.tokenizer:
            raise UserError("missing-argument", "--tokenizer is missing; give the teacher's hub id or folder")
        if not self.text and not self.dataset:
            raise UserError("missing-argument", "no text to prepare; give --text or --dataset")
        count = max(self.shard.count, 1)
        if not 0 <= self.shard.index < self.shard.count:
            raise UserError(
                "bad-argument",
                f"--shard {self.shard} does not exist; shards count from 0: give 0/{count} to {count - 1}/{count}",
            )

    def _check_nothing_else(self) -> None:
        for each in fields(self):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name not in ("merge", "output_dir") and getattr(self, each.name) != default:
                raise UserError(
                    "conflicting-arguments",
                    f"--merge takes only --output_dir; leave out --{each.name}",
                )
