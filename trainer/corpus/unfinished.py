"""A corpus in the making: a folder beside the one it will be, with a record of how far it has come.

``NAME.incomplete`` beside ``NAME``: the files of the corpus (format.py) as far as they are written, and
``progress.json``, a :class:`Progress`. What lies behind the bytes that the record vouches for is cut off when the
build goes on, so a build may be killed at any moment.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from distilspeed.trainer.corpus.format import SourceRecord
from distilspeed.trainer.corpus.shard import Shard
from distilspeed.trainer.corpus.writer import RowWriter, WriterState
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import from_json, locked, sync, sync_tree, write_text

PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_RECORDS = 10.0  # work that a kill can cost; a record takes a few fsyncs


@dataclass(frozen=True)
class Recipe:
    """All that a corpus's bytes depend on; a build goes on only with the same."""

    sources: tuple[SourceRecord, ...]
    document_separator: str
    text_column: str
    tokenizer_hash: str
    seq_length: int
    held_out_fraction: float
    shard: Shard
    versions: dict[str, str]


@dataclass(frozen=True)
class Progress:
    """What has been written, and from what; the next document is number ``written.counts.documents_read``."""

    recipe: Recipe
    written: WriterState

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class UnfinishedCorpus:
    """The folder of a build under way; ``written`` is how far an earlier process came."""

    def __init__(self, folder: Path, recipe: Recipe, written: WriterState | None) -> None:
        self.folder = folder
        self.written = written
        self._recipe = recipe
        self._recorded_at = time.monotonic()

    @property
    def can_be_resumed(self) -> bool:
        return (self.folder / PROGRESS_FILE).is_file()

    def record_when_due(self, writer: RowWriter) -> None:
        if time.monotonic() - self._recorded_at >= SECONDS_BETWEEN_RECORDS:
            self.record(writer)

    def record(self, writer: RowWriter) -> None:
        """Vouch for what has been written: the rows reach the disk before the record that counts them."""
        progress = Progress(self._recipe, writer.state())
        for split in ("train", "held_out"):
            sync(self.folder / split / "data.arrow")
        write_text(self.folder / PROGRESS_FILE, progress.to_json())
        self._recorded_at = time.monotonic()


@contextmanager
def unfinished_corpus(output_dir: Path, recipe: Recipe, resume: bool) -> Iterator[UnfinishedCorpus]:
    """The folder to build in, new or gone on with; on success it becomes ``output_dir``.

    What is wrong with the input (``UserError``) removes it. After anything else, from Ctrl-C to a full disk,
    it stays for ``--resume`` if there is something in it to go on from. ``UserError`` where another build is
    at work, where one was left and ``resume`` is false, and where that one had another recipe.
    """
    folder = output_dir.with_name(f"{output_dir.name}.incomplete")
    folder.mkdir(exist_ok=True)
    at_work = f"another process is preparing {output_dir}; wait for it or choose another --output_dir"
    with locked(folder, wait=0, refusal=at_work):
        build = UnfinishedCorpus(folder, recipe, _what_was_written(folder, recipe, resume))
        try:
            yield build
            sync_tree(folder)
            (folder / PROGRESS_FILE).unlink()
            folder.rename(output_dir)
            sync(output_dir.parent)
        except BaseException as error:
            if build.can_be_resumed and not isinstance(error, UserError):
                print(f"{folder} keeps what was prepared; --resume goes on with it", file=sys.stderr)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _what_was_written(folder: Path, recipe: Recipe, resume: bool) -> WriterState | None:
    path = folder / PROGRESS_FILE
    if not path.is_file():  # new, or killed before there was anything to go on from
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return None
    if not resume:
        raise UserError(
            "unfinished-build", f"{folder} holds an unfinished build; go on with --resume, or remove it"
        )
    try:
        progress = from_json(Progress, path.read_text(encoding="utf-8"))
        sizes = [(folder / split / "data.arrow").stat().st_size for split in ("train", "held_out")]
    except (OSError, ValueError) as error:
        raise UserError(
            "damaged-build", f"{path} is damaged: {error}; remove {folder} to start anew"
        ) from error
    _check_same_recipe(folder, progress.recipe, recipe)
    if sizes[0] < progress.written.train_bytes or sizes[1] < progress.written.held_out_bytes:
        raise UserError(
            "damaged-build", f"{folder} is damaged: its rows are cut short; remove it to start anew"
        )
    return progress.written


def _check_same_recipe(folder: Path, begun: Recipe, asked: Recipe) -> None:
    for name, before in asdict(begun).items():
        now = asdict(asked)[name]
        if now != before:
            raise UserError(
                "changed-build",
                f"{folder} was begun with {name} {before}, not {now}; "
                "give the same arguments, or remove it to start anew",
            )
