"""Prepare a training run: read, resolve and check its arguments, then load its models."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch.distributed
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches, total_steps
from distilspeed.trainer.engine.apex import fused_layer_norm, replace_layer_norms
from distilspeed.trainer.engine.config import DeepSpeedConfig, ResolvedConfig
from distilspeed.trainer.engine.config_auto import Started, resolve_deepspeed_config
from distilspeed.trainer.engine.config_batch import resolve_batch_equation
from distilspeed.trainer.engine.config_check import check_deepspeed_config, check_monitors
from distilspeed.trainer.engine.config_file import read_deepspeed_config
from distilspeed.trainer.engine.optimizers import settle_optimizer
from distilspeed.trainer.engine.student import DTYPES
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families.shape import ModelShape
from distilspeed.trainer.job.ranks import Process, this_process
from distilspeed.trainer.models.attention import SDPA, choose_attention
from distilspeed.trainer.models.compilation import compiler_fault, compiling_pays
from distilspeed.trainer.models.flops import flops_per_token, model_shape
from distilspeed.trainer.models.loading import warn_without_tokenizer
from distilspeed.trainer.models.packed_forward import documents_of
from distilspeed.trainer.objective.objective import Objective
from distilspeed.trainer.objective.outputs import Models
from distilspeed.trainer.objective.registry import check_terms, inapplicable_flag, take_terms, terms_for
from distilspeed.trainer.objective.term import Term
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.checks import check_device, check_output_dir
from distilspeed.trainer.training.hub import check_can_push
from distilspeed.trainer.training.load import LoadedModels, described_start, load_corpus, load_models
from distilspeed.trainer.training.record import read_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything that a run needs, checked before the ranks join and before any file is written."""

    arguments: TrainArguments
    process: Process
    corpus: Corpus
    deepspeed_config: ResolvedConfig
    total_steps: int
    teacher: PreTrainedModel | None
    layers: tuple[int, ...]
    student: PreTrainedModel
    objective: Objective

    @property
    def batch(self) -> BatchEquation:
        return self.deepspeed_config.batch

    @property
    def precision(self) -> str:
        return self.deepspeed_config.precision

    def models(self) -> dict[str, PreTrainedModel]:
        """Return the models by role: "student" and, if there is one, "teacher"."""
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})

    def shapes(self) -> tuple[ModelShape, ModelShape | None]:
        """Return the shapes of the student and, if there is one, the teacher."""
        return model_shape(self.student.config), model_shape(self.teacher.config) if self.teacher else None

    def agreed_by_ranks(self) -> "Run":
        """Return the run with an optimiser that every rank can make, and with ``compile`` "on" or "off".

        Called by every rank, after the ranks join.

        Raises:
            UserError: the encoders shall be compiled, and a rank cannot do it.
        """
        process = self.process
        config = settle_optimizer(self.deepspeed_config, process.device, process.local_rank)
        arguments = replace(self.arguments, compile=self._agreed_compile())
        return replace(self, deepspeed_config=config, arguments=arguments)

    def _agreed_compile(self) -> Literal["on", "off"]:
        process = self.process
        wanted: list[tuple[Literal["on", "off"], bool]] = [("off", False)]
        if process.rank == 0:
            wanted = [self._wanted_compile()]
        torch.distributed.broadcast_object_list(wanted, device=process.device)
        [(choice, is_required)] = wanted
        faults: list[str | None] = [None] * process.world_size
        if choice == "on":
            torch.distributed.all_gather_object(faults, compiler_fault(process.device))
        fault = next(filter(None, faults), None)
        if fault is None:
            return choice
        if is_required:
            raise UserError("unusable-kernels", f"torch.compile fails: {fault}; use --compile off")
        if process.rank == 0:
            logger.warning("the layers are not compiled, because torch.compile fails: %s", fault)
        return "off"

    def _wanted_compile(self) -> tuple[Literal["on", "off"], bool]:
        """Return whether to compile, and whether that is required; a resumed run must compute the same bits."""
        if self.arguments.compile != "auto":
            return self.arguments.compile, True
        if record := read_record(self.arguments.output_dir):
            return record.compile, True
        # The hooks that gather weights (ZeRO-3) or take hidden states cut the layers into small graphs.
        needs = self.objective.needs
        hooked = needs.student_layers or needs.teacher_layers or self.arguments.teacher_zero3
        gathered = self.deepspeed_config.zero_stage == 3
        pays = compiling_pays(self.process.device)
        return "on" if pays and not hooked and not gathered else "off", False

    def flops_per_token(self) -> float:
        """Return the FLOPs of a training step per token of a row."""
        seq_length = self.corpus.manifest.seq_length
        return flops_per_token(*self.shapes(), seq_length, self.objective.head_share)


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a run, before its models are loaded."""

    arguments: TrainArguments
    terms: tuple[Term, ...]
    given: Collection[str]
    process: Process
    config: DeepSpeedConfig
    batch: BatchEquation
    corpus: Corpus
    total_steps: int


def prepare_run(
    arguments: TrainArguments, terms: Sequence[Term] | None = None, given: Collection[str] = ()
) -> Run:
    """Check the arguments and load the models.

    Args:
        terms: the terms of the objective, one of each registered class; None for their defaults. Those that do not
            apply to the corpus's training objective are left out.
        given: the flags on the command line, to refuse those of terms that do not apply or cannot be computed.

    Raises:
        UserError: an input is invalid; nothing has been written.
    """
    inputs = _read_inputs(arguments, terms, given)
    return _prepare_plan(inputs) if arguments.plan else _prepare_training(inputs)


def _prepare_training(inputs: _Inputs) -> Run:
    """Prepare a run that trains on this machine."""
    arguments, device = inputs.arguments, inputs.process.device
    check_device(inputs.config, device)
    layer_norm = fused_layer_norm(device) if arguments.apex_layer_norm else None
    check_output_dir(arguments)
    record = read_record(arguments.output_dir) if arguments.resume else None
    config = _resolve_config(inputs, record.started if record else None)
    if inputs.process.rank == 0:
        check_monitors(config)
        if arguments.push_to_hub:
            check_can_push(arguments.push_to_hub)
    models = load_models(arguments, inputs.corpus)
    if layer_norm is not None:
        for model in models.all():
            replace_layer_norms(model, layer_norm)
    if inputs.process.rank == 0:  # once for all ranks, and last, because it reads the whole corpus
        open_corpus(arguments.data_dir, verify_checksums=True)
    return _make_run(inputs, config, models)


def _prepare_plan(inputs: _Inputs) -> Run:
    """Prepare a run to plan, which may be for another machine than this one."""
    config = _resolve_config(inputs, started=None)
    return _make_run(inputs, config, load_models(inputs.arguments, inputs.corpus))


def _read_inputs(arguments: TrainArguments, terms: Sequence[Term] | None, given: Collection[str]) -> _Inputs:
    process = this_process()
    config = read_deepspeed_config(arguments.deepspeed_config)
    batch = resolve_batch_equation(
        config, process.world_size, arguments.train_batch_size, arguments.per_device_train_batch_size
    )
    corpus = load_corpus(arguments)
    objective = corpus.manifest.objective
    applicable = take_terms({}, objective) if terms is None else terms_for(terms, objective, given)
    check_terms(applicable, arguments.has_teacher)
    if objective == "causal" and "mlm_smoothing" in given:
        raise inapplicable_flag("mlm_smoothing", objective)
    steps = total_steps(
        corpus.manifest.counts.train_rows,
        batch.train_batch_size,
        arguments.max_steps,
        arguments.num_train_epochs,
    )
    return _Inputs(arguments, applicable, given, process, config, batch, corpus, steps)


def _resolve_config(inputs: _Inputs, started: Started | None) -> ResolvedConfig:
    config = resolve_deepspeed_config(
        inputs.config, inputs.batch, inputs.total_steps, inputs.arguments.learning_rate, started
    )
    check_deepspeed_config(config, inputs.total_steps)
    return config


def _make_run(inputs: _Inputs, config: ResolvedConfig, models: LoadedModels) -> Run:
    arguments = inputs.arguments
    teacher_config = models.teacher.config if models.teacher else None
    vocab_size = inputs.corpus.manifest.vocab_size
    of_models = Models(models.student.config, teacher_config, models.layers, vocab_size)
    objective = Objective(inputs.terms, of_models)
    objective.check(inputs.given)
    if inputs.process.rank == 0:
        logger.info("student: starts from %s", described_start(arguments, models.layers))
        for name, reason in objective.refusals.items():
            logger.info("loss_%s takes no part, because %s", name, reason)
        if models.teacher:
            warn_without_tokenizer("teacher", arguments.teacher)
        if arguments.student is not None:
            warn_without_tokenizer("student", arguments.student)
    return Run(
        arguments=arguments,
        process=inputs.process,
        corpus=inputs.corpus,
        deepspeed_config=config,
        total_steps=inputs.total_steps,
        teacher=models.teacher,
        layers=models.layers,
        student=models.student,
        objective=objective,
    )


def settle_attention(run: Run, batches: MicroBatches) -> dict[str, str]:
    """Choose the attention implementation of both models for all ranks; called by every rank.

    Rank 0 measures on the first micro-batch. A resumed run keeps the implementations of its start, so that it
    computes the same bits.

    Returns:
        transformers' names of the implementations, for "student" and "teacher".
    """
    chosen: list[dict[str, str]] = [{}]
    if run.process.rank == 0:
        record = read_record(run.arguments.output_dir)
        if record:
            chosen = [record.attention]
        else:
            documents = documents_of(batches[0])
            choices = {
                role: choose_attention(
                    model,
                    documents,
                    DTYPES[run.precision],
                    run.process.device,
                    is_trained=role == "student",
                    # A choice by measured time may differ between runs.
                    candidates=(SDPA,) if run.arguments.full_determinism else None,
                )
                for role, model in run.models().items()
            }
            logger.info("attention: %s", ", ".join(f"{role} {choice}" for role, choice in choices.items()))
            chosen = [{role: choice.implementation for role, choice in choices.items()}]
    torch.distributed.broadcast_object_list(chosen, device=run.process.device)
    for role, model in run.models().items():
        model.set_attn_implementation(chosen[0][role])
    return chosen[0]
