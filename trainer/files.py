"""Write files and folders atomically: a reader never sees a partial one."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, TypeVar

from distilspeed.trainer.errors import UserError

Record = TypeVar("Record")


@dataclass(frozen=True)
class FileRecord:
    """A file in a folder: its path relative to the folder, its size, and its SHA-256 in hexadecimal."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: Path) -> Self:
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, _sha256(path))

    def damage(self, folder: Path, content: bool = True) -> str | None:
        """Return what is wrong with the file now, or None; compare its checksum only if ``content`` is true."""
        path = folder / self.path
        if path.is_symlink() or not path.is_file():
            return f"{self.path} is missing"
        if path.stat().st_size != self.bytes:
            return f"{self.path} has {path.stat().st_size} bytes instead of {self.bytes}"
        if content and _sha256(path) != self.sha256:
            return f"the content of {self.path} has changed"
        return None


def files_below(folder: Path) -> list[Path]:
    """Return every file below ``folder``, sorted; symbolic links count as files."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_unoccupied(output_dir: Path) -> None:
    """Raise UserError if ``output_dir`` exists, unless it is an empty folder."""
    try:
        output_dir.lstat()
        # The finished folder is renamed to output_dir: a rename replaces an empty folder, but not a link to one.
        if output_dir.is_symlink() or not output_dir.is_dir() or any(output_dir.iterdir()):
            raise UserError(
                "output-exists", f"{output_dir} already exists; choose another --output_dir or remove it"
            )
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(
            "unwritable-output",
            f"cannot create {output_dir}: {error.strerror}; choose another --output_dir",
        ) from error


def check_new_file(path: Path) -> None:
    """Raise UserError if a command's output file exists already or its folder is not writable."""
    try:
        if path.exists() or path.is_symlink():
            raise UserError("output-exists", f"{path} already exists; choose another --output or remove it")
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(
                "unwritable-output",
                f"cannot create {path}: {path.parent} is not a writable directory; create it",
            )
    except OSError as error:
        raise UserError(
            "unwritable-output", f"cannot create {path}: {error.strerror}; choose another --output"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside ``path``; on success sync it to disk and rename it to ``path``."""
    beside = incomplete(path)
    with beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the content of ``path``; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def from_json(record: type[Record], text: str) -> Record:
    """Parse a dataclass instance from the JSON of its ``asdict``.

    Raises:
        ValueError: the JSON does not match the dataclass; one line that names the wrong field.
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
    """Hold a lock on ``folder`` that excludes other processes that lock it.

    Args:
        wait: seconds to wait for a process that holds the lock.
        refusal: message of the UserError if that process still holds it then.
    """
    with writing(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        # On file systems without locks nothing is locked, and on NFS a folder's lock excludes only processes of this
        # host. The package filelock would leave a file in the folder, and there a lock that outlives a killed process.
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
        if not _is_at(descriptor, folder):  # another job has just replaced or removed the folder
            raise UserError("locked", refusal)
        yield
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still is the open file or folder."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def in_use(folder: Path) -> str:
    """Return the message of a job that finds its folder locked."""
    return f"another job uses {folder}; wait for it, or stop it"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Create a folder and lock it for the block; at the end remove it, and new parents, if they are empty.

    Raises:
        UserError: the folder cannot be created, or another job has locked it.
    """
    made = [path for path in [folder.absolute(), *folder.absolute().parents] if not path.exists()]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=0, refusal=in_use(folder)):
        try:
            yield
        finally:
            remove_if_empty(made)


def remove_if_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "unwritable-output", f"cannot write {path}: {error}; check free space and permissions"
        ) from error


@contextmanager
def parents_made(output_dir: Path) -> Iterator[None]:
    """Create the parents of an output folder, and remove the new ones that stay empty.

    An ``OSError`` in the block becomes a UserError.
    """
    made = [folder for folder in output_dir.absolute().parents if not folder.exists()]
    try:
        with writing(output_dir):
            output_dir.parent.mkdir(parents=True, exist_ok=True)
            yield
    finally:
        remove_if_empty(made)


@contextmanager
def folder_written_whole(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """Yield a new folder beside ``path``; rename it to ``path`` on success, remove it on failure.

    Args:
        replaces: replace an existing folder ``path``, which stays complete until the rename. A process killed between
            the two renames leaves the old folder beside ``path``; :func:`bring_back_replaced` restores it.
    """
    previous = _previous(path)
    beside = Path(tempfile.mkdtemp(prefix=f"{path.name}.incomplete-", dir=path.parent))
    try:
        yield beside
        sync_tree(beside)
        # mkdtemp and safetensors give access to the owner alone; output follows the umask.
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
            _bring_back(path)
        raise


def copy_others(source: Path, target: Path, path: Path, *, keeps: bool) -> None:
    """Copy a folder's files to another folder, without what a killed :func:`replacing` of ``path`` has left.

    Args:
        keeps: copy ``path``, too.
    """
    left_out = [incomplete(path).name, *([] if keeps else [path.name])]
    ignored = shutil.ignore_patterns(*left_out)
    shutil.copytree(source, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)


def bring_back_replaced(path: Path) -> None:
    """Undo or complete an interrupted replacement of ``path``.

    Raises:
        UserError: a job that is :func:`alone_in` the folder is just replacing it.
    """
    if _previous(path).exists():
        with locked(_previous(path), wait=0, refusal=in_use(path)):
            _bring_back(path)


def _bring_back(path: Path) -> None:
    previous = _previous(path)
    if not path.exists() and previous.exists():
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def incomplete(path: Path) -> Path:
    """Return the temporary file of :func:`replacing`, which a killed process leaves."""
    return path.with_name(f".{path.name}.incomplete")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def sync_tree(folder: Path) -> None:
    """Sync a folder and everything in it to disk."""
    for path in [folder, *folder.rglob("*")]:
        sync(path)


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
