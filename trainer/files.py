"""Writing files so that a reader never sees half of one."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distilspeed.trainer.errors import UserError


@dataclass(frozen=True)
class FileRecord:
    """One file of a folder: its path inside it, its size, and its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str


def record_files(folder: Path) -> tuple[FileRecord, ...]:
    """Record every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return tuple(
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path)) for path in files
    )


def damage(folder: Path, records: Iterable[FileRecord], besides: Iterable[str] = ()) -> str | None:
    """What is wrong with a folder whose files were recorded; None where it holds these and ``besides``, unchanged."""
    known = {record.path: record for record in records}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if strange := min(found - set(known) - set(besides), default=None):
        return f"{strange} does not belong to it"
    for name, record in known.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != record.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {record.bytes}"
    changed = (name for name, record in known.items() if _sha256(folder / name) != record.sha256)
    return next((f"the content of {name} has changed" for name in changed), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unoccupied(output_dir: Path) -> None:
    """Raise UserError where a command's output folder holds something, or is a file."""
    if output_dir.is_file() or (output_dir.is_dir() and any(output_dir.iterdir())):
        raise UserError(f"{output_dir} exists already; choose another --output_dir or remove it")


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: written beside, synced to disk, renamed."""
    beside = path.with_name(f".{path.name}.incomplete")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a UserError that says what could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; check free space and permissions") from error


@contextmanager
def parents_made(output_dir: Path) -> Iterator[None]:
    """Make the folders above an output folder; those that stay empty go again. ``OSError`` becomes UserError."""
    made = [folder for folder in output_dir.absolute().parents if not folder.exists()]
    try:
        with writing(output_dir):
            output_dir.parent.mkdir(parents=True, exist_ok=True)
            yield
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Give a new folder beside ``path``; on success it becomes ``path``, on failure it goes."""
    beside = Path(tempfile.mkdtemp(prefix=f"{path.name}.incomplete-", dir=path.parent))
    try:
        yield beside
        sync_tree(beside)
        # mkdtemp makes folders that only their owner may read; an output folder follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)
        beside.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def sync_tree(folder: Path) -> None:
    """Have a folder and all that is in it on disk."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def sync(path: Path) -> None:
    """Have one file, or a folder's list of files, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
