"""The terms of the objective; to add one, write its class and add it to this list."""

from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.objective.causal_lm import CausalLM
from distilspeed.trainer.objective.hidden_cosine import HiddenCosine
from distilspeed.trainer.objective.masked_lm import MaskedLM
from distilspeed.trainer.objective.soft_targets import SoftTargets
from distilspeed.trainer.objective.term import Term

TERMS: list[type[Term]] = [SoftTargets, MaskedLM, CausalLM, HiddenCosine]


def take_terms(options: dict[str, Any], objective: TrainingObjective = "masked") -> tuple[Term, ...]:
    """Make a run's terms, removing their settings from ``options``; missing settings get their defaults.

    Raises:
        UserError: a setting is out of range.
    """
    return tuple(
        kind(
            **{setting.name: options.pop(setting.name) for setting in fields(kind) if setting.name in options}
        )
        for kind in TERMS
        if kind.objective in (None, objective)
    )


def terms_for(
    terms: Sequence[Term], objective: TrainingObjective, given: Collection[str]
) -> tuple[Term, ...]:
    """Return the terms that apply to a training objective.

    Args:
        terms: one of each registered class.
        given: the flags on the command line.

    Raises:
        UserError: a flag on the command line, or a setting, does not apply to the objective.
    """
    applicable = []
    for term in terms:
        if term.objective in (None, objective):
            refused = term.refused_flag(objective)
            applicable.append(term)
        else:
            refused = next((flag.name for flag in fields(term) if flag.name in given), None)
        if refused:
            raise inapplicable_flag(refused, objective)
    return tuple(applicable)


def inapplicable_flag(flag: str, objective: TrainingObjective) -> UserError:
    """Return the error for a flag that a training objective cannot use."""
    return UserError(
        "conflicting-arguments",
        f"--{flag} does not apply to {objective} language modelling, for which the corpus was prepared; omit it",
    )


def check_terms(terms: Sequence[Term], has_teacher: bool) -> None:
    """Raise a UserError unless at least one term that can be computed has a weight above 0."""
    if not any(term.weight for term in terms if has_teacher or not term.needs_teacher):
        flags = ", ".join(f"--{term.weight_flag}" for term in terms)
        raise UserError("bad-argument", f"no loss has a weight; set one of {flags} above 0")
