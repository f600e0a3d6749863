"""Load the corpus, teacher and student of a run."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
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
        layers: the teacher's layers that the student is initialised from; () without a teacher.
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
    """Load the teacher and make the student from it, or make the student from a config.

    Raises:
        UserError: a model cannot be loaded, or does not match the corpus.
    """
    if arguments.student_config is not None:
        student = model_from_config(arguments.student_config, arguments.seed)
        check_fits_corpus("student's config", arguments.student_config, student, corpus)
        return LoadedModels(None, (), student)
    teacher = load_teacher(arguments.teacher)
    check_fits_corpus("teacher", arguments.teacher, teacher, corpus)
    layers = select_teacher_layers(teacher.config, arguments.student_layers)
    return LoadedModels(teacher, layers, make_student(teacher, layers))
