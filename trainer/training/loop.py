"""The training loop: start or resume, take steps, save checkpoints, export the student."""

import logging
import shutil
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from distilspeed.trainer.data.batches import MicroBatches, on_device, resolve_num_workers
from distilspeed.trainer.engine.checkpoint import Checkpoints, Progress
from distilspeed.trainer.engine.optimizers import describe_fused_parts
from distilspeed.trainer.engine.student import DTYPES
from distilspeed.trainer.errors import StoppedError, UserError, first_line, memory_errors_named
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.files import bring_back_replaced, in_use, locked, writing
from distilspeed.trainer.job.ranks import joined_job
from distilspeed.trainer.job.watch import JobWatch
from distilspeed.trainer.models.compilation import seconds_compiling
from distilspeed.trainer.models.flops import measure_matmul_flops, warn_of_slow_bf16
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.checks import check_output_dir
from distilspeed.trainer.training.export import export_student, gather_weights, whole_student
from distilspeed.trainer.training.identity import identity_of, record_run
from distilspeed.trainer.training.loss_plot import plot_losses
from distilspeed.trainer.training.metrics import Metrics, StepMetrics, read_metrics
from distilspeed.trainer.training.model_card import TrainingRecord
from distilspeed.trainer.training.record import (
    COMPILE,
    TOTAL_STEPS,
    Changes,
    append_changes,
    find_changes,
    read_record,
    record_student,
)
from distilspeed.trainer.training.run import Run, settle_attention
from distilspeed.trainer.training.step import TrainingStep

logger = logging.getLogger(__name__)

HELD_OUT_ROWS_FOR_CARD = 200
SECONDS_TO_NAME_RANK = 60.0
SECONDS_TO_END = 60.0  # within which a job ends after it was told to stop


def train(run: Run) -> None:
    """Train the student and write ``student/``, ``metrics.jsonl``, ``loss.png`` and ``train_config.json``.

    Raises:
        UserError: the run cannot be resumed, or its folder is not writable.
        NumericalError: a loss or gradient is not finite.
        StoppedError: a signal stopped the run, after it saved a checkpoint.
    """
    arguments, process = run.arguments, run.process
    identity = identity_of(run) if process.rank == 0 else {}
    if process.rank == 0:
        _compare_with_folder(run, identity)
    torch.use_deterministic_algorithms(arguments.full_determinism)
    with (
        # The watch names a rank that does not respond. Collectives do not, so their timeout is longer.
        joined_job(process, arguments.ddp_timeout + SECONDS_TO_NAME_RANK),
        JobWatch(process, arguments.ddp_timeout) as watch,
        _alone_in_folder(run),
        memory_errors_named(),  # here, so that the watch lets one rank report the error
    ):
        changes, is_complete = _compare_for_all(run, identity)
        if is_complete:
            if process.rank == 0:
                logger.info("this run is complete: %s/student exists", arguments.output_dir)
            return
        batches = MicroBatches(run.corpus, run.batch, process.rank, arguments.seed, arguments.mlm_smoothing)
        attention = settle_attention(run, batches)
        training = _start_engine(run, batches)
        if process.rank == 0:
            # Only now: if DeepSpeed rejects the config, the folder stays empty.
            _record(training, identity, attention, changes)
        _take_steps(training, watch)
        _finish(training)


def _checkpoints(arguments: TrainArguments) -> Checkpoints:
    return Checkpoints(
        arguments.output_dir / "checkpoints", arguments.save_total_limit, arguments.save_retain_steps
    )


def _compare_for_all(run: Run, identity: dict[str, Any]) -> tuple[Changes, bool]:
    """Compare again under the lock, because another job may have changed the folder; called by every rank."""
    found: list[tuple[Changes, bool]] = [({}, False)]
    if run.process.rank == 0:
        folder = run.arguments.output_dir
        if run.arguments.resume:
            with writing(folder):
                bring_back_replaced(folder / "student")
        found = [_compare_with_folder(run, identity)]
    torch.distributed.broadcast_object_list(found, device=run.process.device)
    return found[0]


def _compare_with_folder(run: Run, identity: dict[str, Any]) -> tuple[Changes, bool]:
    """Compare a run with the contents of its folder; rank 0 only.

    Returns:
        the settings that a resumed run changes, and whether the run is complete.

    Raises:
        UserError: the run cannot use the folder, or cannot be resumed.
    """
    arguments, folder = run.arguments, run.arguments.output_dir
    check_output_dir(arguments)
    record, taken = read_record(folder), _checkpoints(arguments).newest_step()
    if record is None:
        if taken:
            raise UserError(
                "damaged-record",
                f"{folder} has checkpoints but no train_config.json; restore it, or choose another --output_dir",
            )
        for name in ("student", "metrics.jsonl", "loss.png"):
            if (folder / name).exists():
                raise UserError(
                    "output-exists",
                    f"{folder} has {name} but no train_config.json, so it is not a run to resume; choose another "
                    "--output_dir",
                )
        return {}, False
    changes = find_changes(record, identity, run.deepspeed_config, run.total_steps)
    has_student = (folder / "student").exists()
    steps = max(taken, record.student_step) if has_student else taken
    if run.total_steps < steps:
        raise UserError(
            "changed-run",
            f"this run has already taken {steps} steps, more than {run.total_steps}; give at least as many, "
            "or choose another --output_dir",
        )
    is_complete = has_student and record.student_step == run.total_steps
    if is_complete and (settings := changes.keys() - {TOTAL_STEPS}):
        raise UserError(
            "finished-run",
            f"this run is complete, so {min(settings)} cannot be changed; give more steps, "
            "or choose another --output_dir",
        )
    if has_student and not is_complete and not taken:
        raise UserError(
            "damaged-checkpoint",
            f"the student in {folder} is from step {record.student_step}, but its checkpoints are missing; "
            "restore one from a backup, or choose another --output_dir",
        )
    return changes, is_complete


def _alone_in_folder(run: Run) -> AbstractContextManager[None]:
    """Create and lock the run's folder on rank 0: the ranks of an earlier `deepspeed` command may still run."""
    folder = run.arguments.output_dir
    if run.process.rank != 0:
        return nullcontext()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return locked(folder, SECONDS_TO_END, in_use(folder))


@dataclass(frozen=True)
class _Training:
    """A run with its engine started and its newest checkpoint loaded.

    Attributes:
        first: the progress at which the run starts or resumes.
    """

    run: Run
    batches: MicroBatches
    checkpoints: Checkpoints
    step: TrainingStep
    first: Progress


def _start_engine(run: Run, batches: MicroBatches) -> _Training:
    run = run.agreed_by_ranks()
    checkpoints = _checkpoints(run.arguments)
    newest = checkpoints.newest_good() if run.arguments.resume else None
    if newest:
        run = replace(run, deepspeed_config=checkpoints.config_to_load(newest, run.deepspeed_config))
    step = TrainingStep(run)
    if run.process.rank == 0:
        warn_of_slow_bf16(run.precision, run.process.device)
        logger.info(describe_fused_parts(step.engine))
        logger.info(
            "layers: %s", "compiled in the first step" if run.arguments.compile == "on" else "not compiled"
        )
    first = checkpoints.load(step.engine, newest) if newest else Progress()
    return _Training(run, batches, checkpoints, step, first)


def _record(
    training: _Training, identity: dict[str, Any], attention: dict[str, str], changes: Changes
) -> None:
    """Record the settings of a new run, or the changes of a resumed one."""
    run, folder = training.run, training.run.arguments.output_dir
    record = read_record(folder)
    if record is None:
        record_run(run, identity, attention)
        return
    if record.compile != run.arguments.compile:
        changes = changes | {COMPILE: (record.compile, run.arguments.compile)}
    if changes:
        student_step = record.student_step if (folder / "student").exists() else 0
        logger.info("changed %s", append_changes(folder, training.first.step, changes, student_step))


def _take_steps(training: _Training, watch: JobWatch) -> None:
    """Train to the last step, writing metrics and checkpoints.

    Raises:
        StoppedError: a signal stopped the run, after it saved a checkpoint.
    """
    run, batches, step, progress = training.run, training.batches, training.step, training.first
    arguments, device = run.arguments, run.process.device
    num_workers = resolve_num_workers(arguments.dataloader_num_workers, device)
    loader = on_device(batches.loader(progress.batches, None, num_workers), device)
    metrics = _start_metrics(training)
    # Close the loader here instead of when Python collects it: its workers ignore signals, and the process waits for
    # them when it exits.
    with metrics.progress_bar, closing(loader):
        while progress.step < run.total_steps:
            learning_rate = step.engine.get_lr()[0]
            result = step.take(progress.batches, loader)
            if arguments.compile == "on" and progress is training.first and run.process.rank == 0:
                logger.info("compiling the layers took %.1f s", seconds_compiling())
            progress = progress.after(result.is_update, batches.count_tokens(progress.batches))
            metrics.end_step(progress, _epoch(run, progress), result, learning_rate)
            told_by = watch.told_to_stop()
            if not result.is_update:
                continue
            is_last = progress.step == run.total_steps
            if is_last or told_by or progress.step % arguments.save_steps == 0:
                metrics.flush()
                training.checkpoints.save(step.engine, progress)
            if told_by and not is_last:
                raise StoppedError(
                    f"by {told_by} after step {progress.step}, with a checkpoint saved; continue with --resume"
                )


def _epoch(run: Run, progress: Progress) -> float:
    return progress.batches * run.batch.train_batch_size / run.corpus.manifest.counts.train_rows


def _start_metrics(training: _Training) -> Metrics:
    run = training.run
    progress_bar = tqdm(
        total=run.total_steps,
        initial=training.first.step,
        desc="distilling" if run.teacher else "training",
        unit="step",
        disable=run.process.rank != 0,
    )
    return Metrics(
        run.arguments.output_dir / "metrics.jsonl",
        training.step.engine,
        training.batches,
        progress_bar,
        run.arguments.logging_steps,
        terms=[term.name for term in run.objective.terms],
        flops_per_token=run.flops_per_token(),
        peak_flops=measure_matmul_flops(run.process.device, DTYPES[run.precision]) * run.process.world_size,
        first=training.first,
    )


def _finish(training: _Training) -> None:
    """Write the student, its model card and the loss curves."""
    run = training.run
    weights = gather_weights(training.step.engine, run.student)
    if run.process.rank != 0:
        return
    metrics = _read_metrics_of(run)
    student = whole_student(run.student, weights)
    changed = read_record(run.arguments.output_dir)
    record = TrainingRecord(
        arguments=run.arguments,
        terms=run.objective.terms,
        deepspeed_config=run.deepspeed_config,
        corpus=run.corpus,
        layers=run.layers,
        world_size=run.process.world_size,
        last_step=metrics[-1],
        held_out=held_out_quality(
            nn.Module.to(student, run.process.device), run.corpus, HELD_OUT_ROWS_FOR_CARD
        ),
        changes=changed.changes if changed else (),
    )
    logger.info("held-out rows: %s", record.held_out.described())
    with writing(run.arguments.output_dir):
        plot_losses(metrics, run.arguments.output_dir / "loss.png", run.objective.trained)
        for left in run.arguments.output_dir.glob("student.incomplete-*"):  # leftovers of a killed export
            shutil.rmtree(left)
        export_student(student, record, run.arguments.output_dir / "student")
        record_student(run.arguments.output_dir, run.total_steps)
        logger.info("student written to %s/student", run.arguments.output_dir)


def _read_metrics_of(run: Run) -> list[StepMetrics]:
    """Read the metrics of all steps.

    Raises:
        UserError: the file was removed, emptied or damaged while the run trained or was stopped.
    """
    path = run.arguments.output_dir / "metrics.jsonl"
    try:
        metrics = read_metrics(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "damaged-record",
            f"cannot read {path}: {first_line(error)}; restore it, and run again with --resume",
        ) from error
    if not metrics:
        raise UserError("damaged-record", f"{path} is empty; restore it, and run again with --resume")
    return metrics
