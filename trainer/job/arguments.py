"""The arguments of a command: one frozen dataclass, whose fields are its flags with default, help and limits.

``parser.py`` makes the parser from it. Imports nothing that takes time.
"""

import math
from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from distilspeed.trainer.errors import UserError

LARGEST_SEED = (1 << 32) - 1


@dataclass(frozen=True)
class Limits:
    """What a number must keep to."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return " and ".join(
            f"{name.replace('_', ' ')} {limit:,}" for name, limit in vars(self).items() if limit is not None
        )

    def hold(self, number: float) -> bool:
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )


def setting(
    default: Any = MISSING,
    *,
    help: str,
    default_factory: Any = MISSING,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    parse: Callable[[str], Any] | None = None,
    one_of: str | None = None,
    **options: Any,
) -> Any:
    """A field that is a flag: required without a default, repeatable where it is a tuple.

    Args:
        help: of the flag; the default is added to it, unless it says "default" itself.
        above, at_least, below, at_most: limits of the number, or of each number of a tuple.
        parse: makes the value from the text, where the field's type does not.
        one_of: a name that flags have in common of which only one may be given.
        options: further ones of ``argparse``'s ``add_argument``, ``metavar`` for example.
    """
    metadata = {
        "help": help,
        "limits": Limits(above, at_least, below, at_most),
        "parse": parse,
        "one_of": one_of,
        **options,
    }
    return field(default=default, default_factory=default_factory, metadata=metadata)


class Settings:
    """Base of a dataclass of settings, which are checked when it is made."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: a number is not finite, or not within its field's limits.
        """
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            limits = each.metadata.get("limits", Limits())
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError("bad-argument", f"--{each.name} is {number}; give a finite number")
                if isinstance(number, int | float) and not limits.hold(number):
                    raise UserError("bad-argument", f"--{each.name} must be {limits}")


def whole_numbers(text: str) -> tuple[int, ...]:
    """``0,2,4`` as numbers."""
    return tuple(int(number) for number in text.split(","))


@dataclass(frozen=True)
class LauncherArguments:
    """What DeepSpeed's launcher adds to a command line; the environment's LOCAL_RANK says the same."""

    local_rank: int | None = setting(None, help=SUPPRESS)

    @property
    def was_launched(self) -> bool:
        return self.local_rank is not None
