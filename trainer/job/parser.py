"""The parser of a command, made from the dataclasses of its arguments with transformers' HfArgumentParser.

Import this module only when a parser is made: importing transformers takes a second and may import torch, and the
environment must be prepared before that.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args, get_origin

from transformers import HfArgumentParser

from distilspeed.trainer.job.command import PlainParser, with_default


class CommandParser(PlainParser, HfArgumentParser):
    """Flags from dataclasses of :func:`~distilspeed.trainer.job.arguments.setting` fields, and ``--debug``.

    Unlike HfArgumentParser, it gives each flag one spelling; booleans are switches and tuples are repeatable.

    Attributes:
        given: the names of the flags on the command line that was parsed.
    """

    given: frozenset[str] = frozenset()

    def __init__(self, *kinds: Any, prog: str, description: str | None) -> None:
        self._one_of: dict[str, Any] = {}
        super().__init__(
            kinds,
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_argument(self, *flags: str, **options: Any) -> argparse.Action:
        """Add a flag with the options of HfArgumentParser and of ``setting``."""
        # HfArgumentParser adds --output-dir as a second name of --output_dir.
        flags = tuple(flag for flag in flags if "-" not in flag.lstrip("-"))
        options.pop("limits", None)
        parse, group = options.pop("parse", None), options.pop("one_of", None)
        if parse:
            options["type"] = parse
        elif get_origin(options.get("type")) is tuple:
            _make_repeatable(options)
        elif options.pop("const", False):  # HfArgumentParser would let a boolean take a value
            options = {"action": "store_true", "help": options["help"]}
        options["help"] = with_default(options.get("help", ""), options.get("default"))
        if group is None:
            return super().add_argument(*flags, **options)
        if group not in self._one_of:
            self._one_of[group] = self.add_mutually_exclusive_group()
        return self._one_of[group].add_argument(*flags, **options)

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Parse a command line into the parser's dataclasses, in their order.

        Raises:
            UserError: the command line is invalid, or a dataclass rejects a value.
        """
        typed = sys.argv[1:] if arguments is None else arguments
        found = vars(self.parse_args(typed))
        flags = {part.partition("=")[0] for part in typed}
        self.given = frozenset(name for name in found if f"--{name}" in flags)
        return tuple(
            kind(**{each.name: _unchangeable(found[each.name]) for each in fields(kind)})
            for kind in self.dataclass_types
        )


def _make_repeatable(options: dict[str, Any]) -> None:
    options["type"] = get_args(options["type"])[0]
    options["default"] = list(options["default"])
    if options.setdefault("action", "extend") != "append":
        options["nargs"] = "+"


def _unchangeable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
