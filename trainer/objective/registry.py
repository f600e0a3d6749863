"""The terms of the objective; to add one, write its class and add it to this list."""

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
    """Make a run's terms, removing their settings from ``options``; missing settings get their defaults.

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
    """Raise a UserError unless at least one term that can be computed has a weight above 0."""
    if not any(term.weight for term in terms if has_teacher or not term.needs_teacher):
        flags = ", ".join(f"--{term.weight_flag}" for term in terms)
        raise UserError("bad-argument", f"no loss has a weight; set one of {flags} above 0")
