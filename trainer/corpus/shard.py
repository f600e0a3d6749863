"""A part of all sources, prepared by itself: what one task of a cluster's array does."""

from dataclasses import dataclass
from typing import Self

from distilspeed.trainer.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of the ``count`` that all sources are divided into; the default is all of them."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """``I/N``; UserError unless it is that."""
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(
                "bad-argument", f"--shard {text!r} is not I/N; give for example 0/16, the first of 16"
            )
        return cls(int(parts[0]), int(parts[1]))

    def of(self, things: int) -> range:
        """Which of so many things, numbered from 0, are this shard's: every one is in exactly one shard."""
        return range(things * self.index // self.count, things * (self.index + 1) // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard()
