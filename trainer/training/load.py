"""Load the corpus, teacher and student of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families.registry import check_same_family
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_language_model,
    load_teacher,
    make_student,
    model_from_config,
    select_teacher_layers,
)
from distilspeed.trainer.training.arguments import TrainArguments


@dataclass(frozen=True)
class LoadedModels:
    """Teacher and student on the CPU.

    Attributes:
        layers: the teacher's layers that the student is initialised from; () if it starts elsewhere.
    """

    teacher: PreTrainedModel | None
    layers: tuple[int, ...]
    student: PreTrainedModel

    def all(self) -> list[PreTrainedModel]:
        return [self.student, self.teacher] if self.teacher else [self.student]


def load_corpus(arguments: TrainArguments) -> Corpus:
    """Open the corpus.

    Raises:
        UserError: the corpus cannot be read, or has no training rows.
    """
    corpus = open_corpus(arguments.data_dir)
    if not corpus.manifest.counts.train_rows:
        raise UserError(
            "not-enough-text",
            f"the corpus {arguments.data_dir} has no training rows; prepare it from more text",
        )
    return corpus


def load_models(arguments: TrainArguments, corpus: Corpus) -> LoadedModels:
    """Load the teacher, and make the student from it, from a config or from another model.

    Raises:
        UserError: a model cannot be loaded, or does not match the corpus or the other model.
    """
    teacher = None
    if arguments.has_teacher:
        teacher = load_teacher(arguments.teacher)
        check_fits_corpus("teacher", arguments.teacher, teacher, corpus)
    if arguments.student is not None:
        student = load_language_model("student", arguments.student)
        role, name = "student", arguments.student
    elif arguments.student_config is not None:
        student = model_from_config(arguments.student_config, arguments.seed)
        role, name = "student's config", arguments.student_config
    else:
        assert teacher is not None
        layers = select_teacher_layers(teacher.config, arguments.student_layers)
        return LoadedModels(teacher, layers, make_student(teacher, layers))
    if teacher:
        check_same_family(student.config, teacher.config, f"the {role} {name}")
    check_fits_corpus(role, name, student, corpus)
    return LoadedModels(teacher, (), student)


def described_start(arguments: TrainArguments, layers: Sequence[int]) -> str:
    """Return where the student starts, in words; ``layers`` are those of :class:`LoadedModels`."""
    if arguments.student is not None:
        return f"model {public_name(arguments.student)}"
    if arguments.student_config is not None:
        return f"random weights from config {public_name(arguments.student_config)}"
    return f"the teacher's layers {', '.join(map(str, layers))}"


def public_name(model: str) -> str:
    """Return the hub id of a model or config, or the last part of a local path."""
    return Path(model).name if Path(model).exists() else model
