"""What a file holds, by its content before its name: how it is compressed, and whether it is text, JSON or Parquet."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from distilspeed.trainer.errors import UserError, first_line

READ_BYTES = 1 << 20  # of a file, at a time
BYTE_ORDER_MARK = "\ufeff".encode()

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".csv", ".tsv")
PARQUET_SUFFIX = ".parquet"
PARQUET_MAGIC = b"PAR1"


def _open_zstd(path: Path) -> Any:
    # pyarrow, because Python itself reads zstd from 3.14 on only.
    if not pa.Codec.is_available("zstd"):
        raise UserError(
            "missing-package",
            f"{path} is compressed with zstd, which this pyarrow was built without; "
            "install PyPI's pyarrow, or unpack the file",
        )
    return pa.input_stream(str(path), compression="zstd")


# The first bytes of compressed files: no text in UTF-8 begins so, but for bzip2's three letters, which a block follows.
_unpackers: tuple[tuple[re.Pattern[bytes], Callable[[Path], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _open_zstd),  # a frame, or one to be skipped
)
# No prose begins so: an object with a key, an empty one alone in its line, an array of objects.
_begins_as_object = re.compile(rb'\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\}\s*(?:\n|$))').match
_begins_as_array = re.compile(rb'\[\s*\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\})').match
_begins_as_markup = re.compile(rb"<\?xml|<!doctype|<html|<mediawiki|<doc |\{\\rtf|%PDF-", re.IGNORECASE).match


class Format(Enum):
    """How a file holds documents."""

    TEXT = auto()
    JSON_LINES = auto()
    JSON_ARRAY = auto()
    PARQUET = auto()


@dataclass(frozen=True)
class InputFile:
    """A file whose content is read as it was before it was compressed; offsets count the unpacked bytes."""

    path: Path
    unpack: Callable[[Path], Any] | None

    @classmethod
    def of(cls, path: Path) -> "InputFile":
        """``OSError`` for what cannot be read."""
        with path.open("rb") as file:
            head = file.read(16)
        return cls(path, next((unpack for magic, unpack in _unpackers if magic.match(head)), None))

    def open(self, offset: int = 0) -> BinaryIO:
        """The content from ``offset`` on, in parts; a compressed file is unpacked from its beginning.

        Reading raises ``UserError`` where a compressed file is damaged or cut short.
        """
        if self.unpack is None:
            plain = self.path.open("rb")
            plain.seek(offset)
            return plain
        unpacked = io.BufferedReader(_Unpacked(self.path, self.unpack), READ_BYTES)
        while offset > 0 and (skipped := unpacked.read(min(offset, READ_BYTES))):
            offset -= len(skipped)
        return unpacked

    def size(self) -> int:
        """In bytes; a compressed file is read to its end."""
        if self.unpack is None:
            return self.path.stat().st_size
        with self.open() as file:
            return sum(map(len, iter(lambda: file.read(READ_BYTES), b"")))

    def format(self) -> Format:
        """``UserError`` for markup and tables, whose markup would become text."""
        name = self._name()
        with self.open() as file:
            begin = file.read(READ_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
        if name.endswith(PARQUET_SUFFIX) or self._is_parquet():
            if self.unpack is not None:
                raise UserError("not-plain-text", f"{self.path} is a compressed Parquet file; unpack it")
            return Format.PARQUET
        if self.is_named_json():
            return Format.JSON_ARRAY if begin.startswith(b"[") else Format.JSON_LINES
        if name.endswith(TABLE_SUFFIXES):
            raise UserError(
                "not-plain-text",
                f"{self.path} is a table; put it into a folder of its own and give that as --dataset, "
                "with --text_column",
            )
        if _begins_as_markup(begin):
            raise UserError(
                "not-plain-text",
                f"{self.path} is XML, HTML, RTF or PDF, not plain text; extract its text first "
                "(a Wikipedia dump's with WikiExtractor --json)",
            )
        if _begins_as_array(begin):
            return Format.JSON_ARRAY
        return Format.JSON_LINES if _begins_as_object(begin) else Format.TEXT

    def is_named_json(self) -> bool:
        return self._name().endswith(JSON_SUFFIXES)

    def _name(self) -> str:
        """The file's name in small letters, without a compression's suffix."""
        name = self.path.name.lower()
        return name.removesuffix(next(filter(name.endswith, PACKED_SUFFIXES), ""))

    def _is_parquet(self) -> bool:
        # Begin and end, because a text may begin with these letters, too.
        with self.path.open("rb") as file:
            begin = file.read(len(PARQUET_MAGIC))
            file.seek(-min(len(PARQUET_MAGIC), file.seek(0, io.SEEK_END)), io.SEEK_END)
            return begin == file.read() == PARQUET_MAGIC


class _Unpacked(io.RawIOBase):
    """A compressed file's content; what its library raises becomes a UserError."""

    def __init__(self, path: Path, unpack: Callable[[Path], Any]) -> None:
        super().__init__()
        self._path = path
        self._file = unpack(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            raise UserError(
                "unreadable-file",
                f"{self._path} cannot be unpacked: {first_line(error)}; copy or make it again",
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
