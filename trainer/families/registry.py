"""The registry of model families, one line each."""

from collections.abc import Sequence

from transformers import PreTrainedConfig

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families.bert import BertFamily
from distilspeed.trainer.families.family import Family
from distilspeed.trainer.families.gpt2 import Gpt2Family
from distilspeed.trainer.families.modernbert import ModernBertFamily
from distilspeed.trainer.families.roberta import RobertaFamily

FAMILIES: list[Family] = [
    BertFamily(),
    RobertaFamily(),
    ModernBertFamily(),
    Gpt2Family(),
]


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a teacher's or student's config; raise ``KeyError`` if there is none."""
    for family in FAMILIES:
        if config.model_type in _types(family):
            return family
    raise KeyError(config.model_type)


def checked_family(config: PreTrainedConfig, model_name: str) -> Family:
    """Return the family of a model that the user chose; error messages call the model ``model_name``.

    Raises:
        UserError: no family has this model type, or a model with this config cannot be run on packed rows.
    """
    supported = [model_type for family in FAMILIES for model_type in _types(family)]
    if config.model_type not in supported:
        raise UserError(
            "unsupported-model", f"{_called(config, model_name)}; choose a model of type {_listed(supported)}"
        )
    family = family_of(config)
    refusal = family.refusal(config)
    if refusal:
        raise UserError("unsupported-model", f"{model_name} {refusal}")
    if config.num_hidden_layers < 1:
        raise UserError(
            "unsupported-model",
            f"{model_name} has {config.num_hidden_layers} layers; choose a model with at least one",
        )
    return family


def checked_teacher_family(config: PreTrainedConfig, model_name: str) -> Family:
    """Return the family of a teacher, as :func:`checked_family` does.

    Raises:
        UserError: as there, and if a model with this config cannot be distilled.
    """
    supported = [model_type for family in FAMILIES for model_type in family.teacher_types]
    if config.model_type not in supported:
        raise UserError(
            "unsupported-model",
            f"{_called(config, model_name)}; distilspeed distils models of type {_listed(supported)}",
        )
    family = checked_family(config, model_name)
    refusal = family.teacher_refusal(config)
    if refusal:
        raise UserError("unsupported-model", f"{model_name} {refusal}")
    return family


def check_same_family(student: PreTrainedConfig, teacher: PreTrainedConfig, student_name: str) -> None:
    """Raise a UserError unless student and teacher are of one family; the error calls the student ``student_name``."""
    family = family_of(teacher)
    if student.model_type not in _types(family):
        raise UserError(
            "unsupported-model",
            f"{_called(student, student_name)}, and a teacher of type {_listed([teacher.model_type])} needs a student "
            f"of type {_listed(_types(family))}; choose another student or teacher",
        )


def _types(family: Family) -> tuple[str, ...]:
    return (*family.teacher_types, *family.student_types)


def _called(config: PreTrainedConfig, model_name: str) -> str:
    return f'{model_name} is a "{config.model_type}" model'


def _listed(model_types: Sequence[str]) -> str:
    return ", ".join(f'"{model_type}"' for model_type in dict.fromkeys(model_types))
