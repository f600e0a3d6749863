"""Arguments of a command as one frozen dataclass: each field is a flag with default, help and limits.

``parser.py`` makes the parser from the dataclass. This module has only fast imports.
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
    """The allowed range of a number."""

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
    """Return a dataclass field for a flag; a field without a default is required, a tuple is repeatable.

    Args:
        help: the flag's help; the default is appended, unless the text mentions "default".
        above, at_least, below, at_most: limits of the number, or of each number in a tuple.
        parse: a function from the text to the value; None to use the field's type.
        one_of: the name of a group of mutually exclusive flags.
        options: more options of ``argparse``'s ``add_argument``, such as ``metavar``.
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
    """The base of dataclasses of settings; checks the limits of all fields on creation."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: a number is not finite, or is outside its field's limits.
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
    """Parse a list of integers such as ``0,2,4``."""
    return tuple(int(number) for number in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Parse a list of numbers such as ``2e-5,3e-5``."""
    return tuple(float(number) for number in text.split(","))


@dataclass(frozen=True)
class LauncherArguments:
    """The flag that DeepSpeed's launcher adds to a command line; LOCAL_RANK in the environment has the same value."""

    local_rank: int | None = setting(None, help=SUPPRESS)

    @property
    def was_launched(self) -> bool:
        return self.local_rank is not None
