"""Writing files so that a reader never sees half of one."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from distilspeed.trainer.errors import UserError

Record = TypeVar("Record")


@dataclass(frozen=True)
class FileRecord:
    """One file of a folder: its path inside it, its size, and its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: Path) -> Self:
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path))

    def damage(self, folder: Path, content: bool = True) -> str | None:
        """What is wrong with the file now, its content only where asked for; None: nothing."""
        path = folder / self.path
        if path.is_symlink() or not path.is_file():
            return f"{self.path} is missing"
        if path.stat().st_size != self.bytes:
            return f"{self.path} has {path.stat().st_size} bytes instead of {self.bytes}"
        if content and _sha256(path) != self.sha256:
            return f"the content of {self.path} has changed"
        return None


def files_below(folder: Path) -> list[Path]:
    """Every file below ``folder``, in order; links are files."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unoccupied(output_dir: Path) -> None:
    """Raise UserError where a command's output folder is there already, unless it is an empty folder."""
    try:
        output_dir.lstat()
        # A folder is renamed to it in the end: that replaces an empty folder, but no link to one.
        if output_dir.is_symlink() or not output_dir.is_dir() or any(output_dir.iterdir()):
            raise UserError(
                "output-exists", f"{output_dir} exists already; choose another --output_dir or remove it"
            )
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(
            "unwritable-output", f"{output_dir} cannot be made: {error.strerror}; choose another --output_dir"
        ) from error


def check_new_file(path: Path) -> None:
    """Raise UserError where a command's output file is there already, or could not be written."""
    try:
        if path.exists() or path.is_symlink():
            raise UserError("output-exists", f"{path} exists already; choose another --output or remove it")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(
                "unwritable-output", f"{path} cannot be made: {path.parent} is no folder to write to; make it"
            )
    except OSError as error:
        raise UserError(
            "unwritable-output", f"{path} cannot be made: {error.strerror}; choose another --output"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: written beside, synced to disk, renamed."""
    beside = path.with_name(f".{path.name}.incomplete")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def from_json(record: type[Record], text: str) -> Record:
    """A dataclass's instance from the JSON of its ``asdict``.

    Raises:
        ValueError: it is not one; says in one line which field is wrong.
    """
    from pydantic import TypeAdapter, ValidationError  # not at the top: `distilspeed profile` runs without it

    try:
        return TypeAdapter(record).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{field}: {first['msg']}" if field else first["msg"]) from error


@contextmanager
def locked(folder: Path, wait: float, refusal: str) -> Iterator[None]:
    """Keep other processes that want the same out of ``folder``.

    Args:
        wait: seconds to wait for one that is there.
        refusal: the UserError for when it stays.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # File systems without locks (some network ones) do without. The package filelock would leave a file in the
        # folder, and on such file systems a lock that survives a kill.
        with contextlib.suppress(OSError):
            end = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= end:
                        raise UserError("locked", refusal) from error
                    time.sleep(0.5)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a UserError that says what could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "unwritable-output", f"cannot write {path}: {error}; check free space and permissions"
        ) from error


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
def folder_written_whole(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Give a new folder beside ``path``; on success it becomes ``path``, on failure it goes.

    Args:
        replaces: the folder that ``path`` is now, which stays whole until then. A process that is killed between the
            two renames leaves it beside; :func:`bring_back_replaced` puts it right.
    """
    previous = _previous(path)
    beside = Path(tempfile.mkdtemp(prefix=f"{path.name}.incomplete-", dir=path.parent))
    try:
        yield beside
        sync_tree(beside)
        # mkdtemp makes folders that only their owner may read, safetensors such files; output follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        for made in [beside, *beside.rglob("*")]:
            made.chmod((0o777 if made.is_dir() else 0o666) & ~umask)
        if replaces and path.exists():
            path.rename(previous)
        beside.rename(path)
        sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if replaces:
            bring_back_replaced(path)
        raise


def bring_back_replaced(path: Path) -> None:
    """Undo or complete a replacement of ``path`` that was cut off."""
    previous = _previous(path)
    if not path.exists() and previous.exists():
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


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
