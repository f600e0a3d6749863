"""Files of lines: split them into shards, check that they are text, and read them.

A document is one line, or the lines up to a blank line. Compressing a file does not change its shards.
"""

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path

from distilspeed.trainer.corpus.arguments import Separator
from distilspeed.trainer.corpus.recognition import BYTE_ORDER_MARK, READ_BYTES, InputFile
from distilspeed.trainer.corpus.shard import WHOLE, Shard
from distilspeed.trainer.corpus.tokenization import is_blank
from distilspeed.trainer.errors import UserError

# A longer line (give or take READ_BYTES) or document is refused: this length takes 2 GB of memory (November 2026).
LONGEST_LINE = 64 << 20


def lines_of(file: InputFile, shard: Shard, separator: Separator) -> range:
    """Return the byte range of a shard: the documents that begin in its part of the file.

    Raises ``UserError`` if the text is not UTF-8, or has a line or document that is too long.
    """
    if shard == WHOLE:
        lines = range(sys.maxsize)  # to the end of the file, which check_text finds
    else:
        part = shard.of(file.size())
        lines = range(_next_start(file, part.start, separator), _next_start(file, part.stop, separator))
    lines = range(lines.start, check_text(file, lines, LONGEST_LINE))
    if separator == "blank_line":
        for _ in read_paragraphs(file, lines):
            pass  # raises for a document that is too long
    return lines


def _next_start(file: InputFile, offset: int, separator: Separator) -> int:
    """Return the offset of the first line at or after ``offset``; with "blank_line", the first after a blank line.

    Only ASCII white space makes a line blank here. A missed blank line moves a boundary but never splits a document.
    """
    if offset == 0:
        return 0
    place = offset - 1
    is_blank = False  # the line of this byte may begin earlier, so it never counts as blank
    with file.open(place) as content:
        while part := content.readline(READ_BYTES):
            place += len(part)
            is_blank = is_blank and part.isspace()
            if part.endswith(b"\n"):
                if is_blank or separator == "line":
                    break
                is_blank = True
    return place


def check_text(file: InputFile, lines: range, longest_line: float) -> int:
    """Return the offset where ``lines`` end; raise ``UserError`` if they are not UTF-8 or one is too long."""
    path = file.path
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = line_start = lines.start
    with file.open(offset) as content:
        while True:
            block = content.read(min(READ_BYTES, lines.stop - offset))
            carried = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    "not-utf8",
                    f"{path} is not UTF-8 at byte {offset - carried + error.start}; "
                    "convert it to UTF-8, or unpack it if it is an archive",
                ) from error
            if not block:
                return offset
            if (place := block.find(b"\0")) >= 0:
                raise UserError(
                    "not-utf8",
                    f"{path} is binary or UTF-16: byte {offset + place} is 0; "
                    "convert it to UTF-8, or unpack it if it is an archive",
                )
            if (end := block.rfind(b"\n")) >= 0:
                line_start = offset + end + 1
            offset += len(block)
            if offset - line_start > longest_line:
                raise UserError(
                    "line-too-long",
                    f"{path} has a line of more than {LONGEST_LINE >> 20} MiB at byte {line_start}; "
                    "put each document on its own line",
                )


def read_lines(file: InputFile, lines: range) -> Iterator[str]:
    """Yield the lines in a byte range, without their line ends (\\n, \\r\\n or \\r)."""
    with file.open(lines.start) as content:
        left = len(lines)
        while left > 0:
            line = content.readline()
            if not line:
                raise OSError("the file was truncated while it was read")
            if left == len(lines) and lines.start == 0:
                left -= len(BYTE_ORDER_MARK) if line.startswith(BYTE_ORDER_MARK) else 0
                line = line.removeprefix(BYTE_ORDER_MARK)
            left -= len(line)
            # readline() does not split at \r alone, the line end of old Macintosh files.
            for part in line.splitlines():
                yield part.decode("utf-8")


def read_paragraphs(file: InputFile, lines: range) -> Iterator[str]:
    """Yield documents: the lines between blank lines, joined by \\n.

    Raises ``UserError`` for a document of more than ``LONGEST_LINE`` characters.
    """
    paragraph: list[str] = []
    length = 0
    for line in read_lines(file, lines):
        if is_blank(line):
            if paragraph:
                yield "\n".join(paragraph)
            paragraph, length = [], 0
            continue
        paragraph.append(line)
        length += len(line)
        if length > LONGEST_LINE:
            raise UserError("line-too-long", _too_long(file.path, paragraph[0]))
    if paragraph:
        yield "\n".join(paragraph)


def _too_long(path: Path, first: str) -> str:
    return (
        f"{path} has a document of more than {LONGEST_LINE >> 20} Mi characters that begins with {first[:40]!r}; "
        "put blank lines between documents, or leave out --document_separator"
    )
