"""The terms of the objective: a new one is a class, and its place in this list."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.objective.hidden_cosine import HiddenCosine
from distilspeed.trainer.objective.masked_lm import MaskedLM
from distilspeed.trainer.objective.soft_targets import SoftTargets
from distilspeed.trainer.objective.term import Term

TERMS: list[type[Term]] = [SoftTargets, MaskedLM, HiddenCosine]


def take_terms(options: dict[str, Any]) -> tuple[Term, ...]:
    """A run's terms, with their settings taken out of a command's options; settings not among them have defaults.

    Raises:
        UserError: a setting is out of range.
    """
    return tuple(
        kind(
            **{setting.name: options.pop(setting.name) for setting in fields(kind) if setting.name in options}
        )
        for kind in TERMS
    )


def check_terms(terms: Sequence[Term], has_teacher: bool) -> None:
    """Raise a UserError unless a term that can be computed has a weight."""
    if not any(term.weight for term in terms if has_teacher or not term.needs_teacher):
        flags = ", ".join(f"--{term.weight_flag}" for term in terms)
        raise UserError("bad-argument", f"no loss is left to train on; give one of {flags} a value above 0")
