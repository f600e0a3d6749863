"""An unfinished corpus: the folder that a build writes to, and a record of its progress.

``NAME.incomplete``, beside ``NAME``, has the corpus files written so far (format.py) and ``progress.json``, a
:class:`BuildProgress`. A resumed build truncates the files to the sizes in that record, so a build may be killed
at any time.
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
# Errors of a network or a disk: the same command may succeed later.
PASSING_ERRORS = ("unusable-dataset", "unreadable-file", "unwritable-output")
SECONDS_BETWEEN_RECORDS = 10.0  # a kill loses at most this much work; a record costs a few fsyncs


@dataclass(frozen=True)
class Recipe:
    """Everything that the bytes of a corpus depend on; a build can be resumed only with the same recipe."""

    sources: tuple[SourceRecord, ...]
    document_separator: str
    text_column: str
    tokenizer_hash: str
    seq_length: int
    held_out_fraction: float
    shard: Shard
    versions: dict[str, str]


@dataclass(frozen=True)
class BuildProgress:
    """What was written, and from which recipe; the next document is number ``written.counts.documents_read``."""

    recipe: Recipe
    written: WriterState

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class UnfinishedCorpus:
    """The folder of a running build; ``written`` is the progress of an earlier process."""

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
        """Save the progress; the rows are synced to disk before the record that counts them."""
        progress = BuildProgress(self._recipe, writer.state())
        for split in ("train", "held_out"):
            sync(self.folder / split / "data.arrow")
        write_text(self.folder / PROGRESS_FILE, progress.to_json())
        self._recorded_at = time.monotonic()


@contextmanager
def unfinished_corpus(output_dir: Path, recipe: Recipe, resume: bool) -> Iterator[UnfinishedCorpus]:
    """Yield the folder to build in, new or resumed; rename it to ``output_dir`` on success.

    Bad input (``UserError``) removes the folder. After any other failure, from Ctrl-C to a lost connection, the folder
    stays for ``--resume`` if it has a progress record. Raises ``UserError`` if another build is running, if an
    unfinished build exists and ``resume`` is false, or if that build has another recipe.
    """
    folder = output_dir.with_name(f"{output_dir.name}.incomplete")
    folder.mkdir(exist_ok=True)
    refusal = f"another process is preparing {output_dir}; wait for it or choose another --output_dir"
    with locked(folder, wait=0, refusal=refusal):
        build = UnfinishedCorpus(folder, recipe, _written_before(folder, recipe, resume))
        try:
            yield build
            sync_tree(folder)
            (folder / PROGRESS_FILE).unlink()
            folder.rename(output_dir)
            sync(output_dir.parent)
        except BaseException as error:
            is_bad_input = isinstance(error, UserError) and error.code not in PASSING_ERRORS
            if build.can_be_resumed and not is_bad_input:
                print(f"{folder} has the unfinished build; continue with --resume", file=sys.stderr)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _written_before(folder: Path, recipe: Recipe, resume: bool) -> WriterState | None:
    path = folder / PROGRESS_FILE
    if not path.is_file():  # new, or killed before the first record
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return None
    if not resume:
        raise UserError(
            "unfinished-build",
            f"{folder} has an unfinished build; continue with --resume, or remove it to start over",
        )
    try:
        progress = from_json(BuildProgress, path.read_text(encoding="utf-8"))
        sizes = [(folder / split / "data.arrow").stat().st_size for split in ("train", "held_out")]
    except (OSError, ValueError) as error:
        raise UserError(
            "damaged-build", f"{path} is damaged: {error}; remove {folder} to start over"
        ) from error
    _check_same_recipe(folder, progress.recipe, recipe)
    if sizes[0] < progress.written.train_bytes or sizes[1] < progress.written.held_out_bytes:
        raise UserError("damaged-build", f"{folder} is damaged: rows are missing; remove it to start over")
    return progress.written


def _check_same_recipe(folder: Path, begun: Recipe, asked: Recipe) -> None:
    for name, before in asdict(begun).items():
        now = asdict(asked)[name]
        if now != before:
            raise UserError(
                "changed-build",
                f"{folder} was started with {name} {before}, not {now}; "
                "give the same arguments, or remove it to start over",
            )
