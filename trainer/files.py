"""Writing files so that a reader never sees half of one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distilspeed.trainer.errors import UserError


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
def parents_made(output_dir: Path) -> Iterator[None]:
    """Make the folders above an output folder; those that stay empty go again. ``OSError`` becomes UserError."""
    made = [folder for folder in output_dir.absolute().parents if not folder.exists()]
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"cannot write {output_dir}: {error}; check free space and permissions") from error
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
