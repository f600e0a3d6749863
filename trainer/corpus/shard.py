"""A part of all sources, prepared on its own, for example by one task of a cluster's job array."""

from dataclasses import dataclass
from typing import Self

from distilspeed.trainer.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count`` equal parts of all sources; the default is everything."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``I/N``; raise UserError for other text."""
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(
                "bad-argument", f"--shard {text!r} is not I/N; give for example 0/16 for the first of 16"
            )
        return cls(int(parts[0]), int(parts[1]))

    def of(self, things: int) -> range:
        """Return the items of this shard out of ``things`` items numbered from 0; each is in exactly one shard."""
        return range(things * self.index // self.count, things * (self.index + 1) // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard()
