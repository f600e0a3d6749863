"""Detect the compression and format (text, JSON or Parquet) of a file, by content and name."""

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

READ_BYTES = 1 << 20  # read from a file at a time
BYTE_ORDER_MARK = "\ufeff".encode()

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
TABLE_SUFFIXES = (".csv", ".tsv")
PARQUET_SUFFIX = ".parquet"
PARQUET_MAGIC = b"PAR1"


def _open_zstd(path: Path) -> Any:
    # pyarrow, because Python's standard library reads zstd only since 3.14.
    if not pa.Codec.is_available("zstd"):
        raise UserError(
            "missing-package",
            f"{path} is compressed with zstd, and this pyarrow was built without zstd; "
            "install pyarrow from PyPI, or decompress the file",
        )
    return pa.input_stream(str(path), compression="zstd")


# The first bytes of compressed files. UTF-8 text never begins with them, except with the letters of bzip2; so the bzip2
# pattern includes the block header.
_unpackers: tuple[tuple[re.Pattern[bytes], Callable[[Path], Any]], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\0"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _open_zstd),  # a frame, or a skippable frame
)
# Prose does not begin like this: an object with a key, an empty object alone on its line, an array of objects.
_begins_as_object = re.compile(rb'\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\}\s*(?:\n|$))').match
_begins_as_array = re.compile(rb'\[\s*\{\s*(?:"(?:[^"\\]|\\.)*"\s*:|\})').match
_begins_as_markup = re.compile(rb"<\?xml|<!doctype|<html|<mediawiki|<doc |\{\\rtf|%PDF-", re.IGNORECASE).match


class Format(Enum):
    """The format of a file of documents."""

    TEXT = auto()
    JSON_LINES = auto()
    JSON_ARRAY = auto()
    PARQUET = auto()


@dataclass(frozen=True)
class InputFile:
    """A file, decompressed as it is read; offsets count decompressed bytes."""

    path: Path
    unpack: Callable[[Path], Any] | None

    @classmethod
    def of(cls, path: Path) -> "InputFile":
        """Detect the compression of ``path``; raise ``OSError`` if it cannot be read."""
        with path.open("rb") as file:
            head = file.read(16)
        return cls(path, next((unpack for magic, unpack in _unpackers if magic.match(head)), None))

    def open(self, offset: int = 0) -> BinaryIO:
        """Open the content at ``offset``; a compressed file is decompressed from its start, in parts.

        Reading raises ``UserError`` if a compressed file is damaged or truncated.
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
        """Return the size in bytes; reads a compressed file to its end."""
        if self.unpack is None:
            return self.path.stat().st_size
        with self.open() as file:
            return sum(map(len, iter(lambda: file.read(READ_BYTES), b"")))

    def format(self) -> Format:
        """Detect the format; raise ``UserError`` for markup and tables, which are not plain text."""
        name = self._name()
        with self.open() as file:
            begin = file.read(READ_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
        if name.endswith(PARQUET_SUFFIX) or self._is_parquet():
            if self.unpack is not None:
                raise UserError("not-plain-text", f"{self.path} is a compressed Parquet file; decompress it")
            return Format.PARQUET
        if self.is_named_json():
            return Format.JSON_ARRAY if begin.startswith(b"[") else Format.JSON_LINES
        if name.endswith(TABLE_SUFFIXES):
            raise UserError(
                "not-plain-text",
                f"{self.path} is a table; put it in its own folder and give that folder as --dataset, "
                "with --text_column",
            )
        if _begins_as_markup(begin):
            raise UserError(
                "not-plain-text",
                f"{self.path} is XML, HTML, RTF or PDF, not plain text; extract its text first "
                "(for a Wikipedia dump with WikiExtractor --json)",
            )
        if _begins_as_array(begin):
            return Format.JSON_ARRAY
        return Format.JSON_LINES if _begins_as_object(begin) else Format.TEXT

    def is_named_json(self) -> bool:
        return self._name().endswith(JSON_SUFFIXES)

    def _name(self) -> str:
        """Return the file name in lower case, without a compression suffix."""
        name = self.path.name.lower()
        return name.removesuffix(next(filter(name.endswith, PACKED_SUFFIXES), ""))

    def _is_parquet(self) -> bool:
        # Check both ends, because text may begin with these letters, too.
        with self.path.open("rb") as file:
            begin = file.read(len(PARQUET_MAGIC))
            file.seek(-min(len(PARQUET_MAGIC), file.seek(0, io.SEEK_END)), io.SEEK_END)
            return begin == file.read() == PARQUET_MAGIC


class _Unpacked(io.RawIOBase):
    """The content of a compressed file; errors of the decompressor become UserErrors."""

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
                f"cannot decompress {self._path}: {first_line(error)}; copy or compress it again",
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
