"""A training run before it starts: its arguments checked against each other, its models, its record."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches, total_steps
from distilspeed.trainer.engine.apex import fused_layer_norm, replace_layer_norms
from distilspeed.trainer.engine.config import (
    read_deepspeed_config,
    resolve_batch_equation,
    resolve_deepspeed_config,
    resolve_precision,
)
from distilspeed.trainer.engine.config_check import check_deepspeed_config, check_monitors
from distilspeed.trainer.engine.optimizers import choose_optimizer, leave_choice_open, settle_optimizer
from distilspeed.trainer.engine.student import DTYPES, check_precision
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families.shape import ModelShape
from distilspeed.trainer.job.ranks import Process, this_process
from distilspeed.trainer.models.attention import SDPA, choose_attention
from distilspeed.trainer.models.flops import flops_per_token, model_shape
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_teacher,
    make_student,
    model_from_config,
    select_teacher_layers,
    warn_without_tokenizer,
)
from distilspeed.trainer.objective.kernel_check import check_kernels
from distilspeed.trainer.objective.objective import Objective
from distilspeed.trainer.objective.outputs import Models
from distilspeed.trainer.objective.registry import check_terms, take_terms
from distilspeed.trainer.objective.term import Term
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.record import read_record, write_record

RECORDED_PACKAGES = ("distilspeed", "torch", "deepspeed", "transformers", "datasets")


@dataclass(frozen=True)
class Run:
    """Everything a run needs, checked, before any process is joined or file written."""

    arguments: TrainArguments
    process: Process
    corpus: Corpus
    batch: BatchEquation
    precision: str
    deepspeed_config: dict[str, Any]
    total_steps: int
    teacher: PreTrainedModel | None
    layers: tuple[int, ...]
    student: PreTrainedModel
    objective: Objective

    def models(self) -> dict[str, PreTrainedModel]:
        """Student and, if there is one, teacher, by these names."""
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})

    def shapes(self) -> tuple[ModelShape, ModelShape | None]:
        """The sizes of student and, if there is one, teacher."""
        return model_shape(self.student.config), model_shape(self.teacher.config) if self.teacher else None

    def with_optimizer_settled(self) -> "Run":
        """The run with the optimiser that every rank can make; called by every rank, when the ranks have joined."""
        process = self.process
        config = settle_optimizer(self.deepspeed_config, process.device, process.local_rank)
        return replace(self, deepspeed_config=config)

    def flops_per_token(self) -> float:
        """FLOPs of a training step per token of a row."""
        seq_length = self.corpus.manifest.seq_length
        return flops_per_token(*self.shapes(), seq_length, self.objective.head_share)


def prepare_run(arguments: TrainArguments, terms: Sequence[Term] | None = None) -> Run:
    """Check every argument against every other and load the models.

    Args:
        terms: of the objective, one of each registered class; None: with their defaults.

    Raises:
        UserError: for anything the caller can put right; nothing has been written then.
    """
    terms = take_terms({}) if terms is None else tuple(terms)
    check_terms(terms, arguments.has_teacher)
    process = this_process()
    config = read_deepspeed_config(arguments.deepspeed_config)
    # The choice of all machines; that of this job's is made when its ranks can agree on it (settle_optimizer).
    checked_config = choose_optimizer(config, torch.device("cpu"))
    batch = resolve_batch_equation(
        config, process.world_size, arguments.train_batch_size, arguments.per_device_train_batch_size
    )
    precision = resolve_precision(config)
    if not arguments.plan:  # a plan is made anywhere, for machines that are elsewhere
        check_precision(precision, process.device)
        if arguments.student_config is None:  # else there is no teacher, and no kernel of ours
            check_kernels(process.device)
    use_apex = arguments.apex_layer_norm and not arguments.plan
    layer_norm = fused_layer_norm(process.device) if use_apex else None
    check_output_dir(arguments)
    corpus = open_corpus(arguments.data_dir)
    if not corpus.manifest.counts.train_rows:
        raise UserError(
            "not-enough-text",
            f"the corpus {arguments.data_dir} has no training rows; prepare it from more text",
        )
    steps = total_steps(
        corpus.manifest.counts.train_rows,
        batch.train_batch_size,
        arguments.max_steps,
        arguments.num_train_epochs,
    )
    record = read_record(arguments.output_dir) if arguments.resume and not arguments.plan else None
    deepspeed_config = resolve_deepspeed_config(
        checked_config, batch, steps, arguments.learning_rate, record.started if record else None
    )
    check_deepspeed_config(deepspeed_config, steps)
    if process.rank == 0 and not arguments.plan:
        check_monitors(deepspeed_config)
    deepspeed_config = leave_choice_open(deepspeed_config, config)

    teacher: PreTrainedModel | None = None
    layers: tuple[int, ...] = ()
    if arguments.student_config is None:
        teacher = load_teacher(arguments.teacher)
        check_fits_corpus("teacher", arguments.teacher, teacher, corpus)
        layers = select_teacher_layers(teacher.config.num_hidden_layers, arguments.student_layers)
        student = make_student(teacher, layers)
    else:
        student = model_from_config(arguments.student_config, arguments.seed)
        check_fits_corpus("student's config", arguments.student_config, student, corpus)
    if layer_norm is not None:
        for model in (student, teacher) if teacher else (student,):
            replace_layer_norms(model, layer_norm)
    # Last and once for all ranks, because it reads the whole corpus.
    if process.rank == 0 and not arguments.plan:
        open_corpus(arguments.data_dir, verify_checksums=True)
    if process.rank == 0 and teacher:
        warn_without_tokenizer("teacher", arguments.teacher)
    objective = Objective(terms, Models(student.config, teacher.config if teacher else None, layers))
    return Run(
        arguments,
        process,
        corpus,
        batch,
        precision,
        deepspeed_config,
        steps,
        teacher,
        layers,
        student,
        objective,
    )


def check_output_dir(arguments: TrainArguments) -> None:
    """Raise a UserError unless the run's folder can be written, and is empty or to be resumed."""
    if arguments.plan:  # which writes nothing
        return
    folder = arguments.output_dir.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(
            "unwritable-output",
            f"--output_dir {arguments.output_dir}: {nearest} is no folder; choose another",
        )
    if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(
            "unwritable-output",
            f"--output_dir {arguments.output_dir}: {nearest} cannot be written; choose another",
        )
    for flag, given in (("--data_dir", arguments.data_dir), ("--teacher", Path(arguments.teacher))):
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise UserError(
                "output-inside-input",
                f"--output_dir {arguments.output_dir} is inside {flag} {given}; choose a folder outside",
            )
    if not arguments.resume and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            "output-exists",
            f"{arguments.output_dir} holds files already; continue it with --resume or choose another --output_dir",
        )


def settle_attention(run: Run, batches: MicroBatches) -> dict[str, str]:
    """Set the attention that both models run with, the same on every rank; called by every rank.

    Rank 0 measures, on the first micro-batch; a resumed run takes what the run was started with, so that it computes
    the same bits.

    Returns:
        transformers' name of the implementation, for "student" and "teacher".
    """
    chosen: list[dict[str, str]] = [{}]
    if run.process.rank == 0:
        record = read_record(run.arguments.output_dir)
        if record:
            chosen = [record.attention]
        else:
            document_ids = batches[0].document_ids
            choices = {
                role: choose_attention(
                    model,
                    document_ids,
                    DTYPES[run.precision],
                    run.process.device,
                    is_trained=role == "student",
                    # A choice by time may be another in the next run.
                    candidates=(SDPA,) if run.arguments.full_determinism else None,
                )
                for role, model in run.models().items()
            }
            print("attention: " + ", ".join(f"{role} {choice}" for role, choice in choices.items()))
            chosen = [{role: choice.implementation for role, choice in choices.items()}]
    torch.distributed.broadcast_object_list(chosen, device=run.process.device)
    for role, model in run.models().items():
        model.set_attn_implementation(chosen[0][role])
    return chosen[0]


def record_run(run: Run, identity: dict[str, Any], attention: dict[str, str]) -> None:
    """Write ``train_config.json`` of a run that starts.

    Raises:
        UserError: it cannot be written.
    """
    write_record(
        run.arguments.output_dir,
        {
            "identity": identity,
            "arguments": {name: _plain(value) for name, value in asdict(run.arguments).items()}
            | run.objective.settings(),
            "deepspeed_config": run.deepspeed_config,
            "student_layers": run.layers,
            "attention": attention,
            "versions": {package: version(package) for package in RECORDED_PACKAGES},
            "changes": [],
            "student_step": 0,
        },
    )


def identity_of(run: Run) -> dict[str, Any]:
    """What must not change when a run is resumed; reads all weights of the teacher."""
    return {
        "teacher": _weights_hash(run.teacher) if run.teacher else None,
        "student": asdict(run.shapes()[0]),
        "student_layers": list(run.layers),
        "data": {record.path: record.sha256 for record in run.corpus.manifest.files},
        "train_batch_size": run.batch.train_batch_size,
        "micro_batch_size": run.batch.micro_batch_size,
        "total_steps": run.total_steps,
        "precision": run.precision,
        "zero_stage": run.deepspeed_config.get("zero_optimization", {}).get("stage", 0),
        "optimizer": run.deepspeed_config.get("optimizer", {}).get("type"),
        "seed": run.arguments.seed,
    } | run.objective.identity()


def _weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of all weights, float32, and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
