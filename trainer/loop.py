"""The training loop, and the student that comes out of it."""

import deepspeed
import torch
import torch.distributed
from torch import nn
from tqdm import tqdm

from distilspeed.trainer.batches import DROPOUT_STREAM, MicroBatches
from distilspeed.trainer.checkpoint import Checkpoints, Progress
from distilspeed.trainer.distillation import Distillation, Objective
from distilspeed.trainer.engines import DTYPES, join_job, optimizer_step, student_engine
from distilspeed.trainer.evaluation import masked_token_quality
from distilspeed.trainer.export import TrainingRecord, export_student, gather_weights, whole_student
from distilspeed.trainer.masking import philox
from distilspeed.trainer.metrics import Metrics, plot_losses, read_metrics
from distilspeed.trainer.optimizers import describe_fused_parts
from distilspeed.trainer.plan import flops_per_token, measure_matmul_flops, model_shape
from distilspeed.trainer.run import Run, record_run
from distilspeed.trainer.teacher import make_teacher

HELD_OUT_ROWS_FOR_CARD = 200


def train(run: Run) -> None:
    """Train the student and write ``student/``, ``metrics.jsonl``, ``loss.png`` and ``train_config.json``."""
    arguments, process = run.arguments, run.process
    if (arguments.output_dir / "student").exists():
        if process.rank == 0:
            print(f"{arguments.output_dir}/student exists: this run is complete")
        return
    join_job(process)
    checkpoints = Checkpoints(arguments.output_dir / "checkpoints", arguments.save_total_limit)
    record_run(run, resuming=checkpoints.any())

    objective = Objective(
        arguments.alpha_ce,
        arguments.alpha_mlm,
        arguments.alpha_cos,
        arguments.temperature,
        arguments.restrict_ce_to_mask,
    )
    gradient_shares = run.batch.world_size * run.batch.gradient_accumulation_steps
    distillation = Distillation(run.student, objective, gradient_shares)
    engine = student_engine(distillation, run.deepspeed_config)
    if process.rank == 0:
        print(describe_fused_parts(engine))
    dtype = DTYPES[run.precision]
    teacher = make_teacher(run) if run.teacher else None
    progress = checkpoints.resume(engine) if checkpoints.any() else Progress()

    batches = MicroBatches(run.corpus, run.batch, process.rank, arguments.seed)
    loader = iter(batches.loader(progress.step, run.total_steps, arguments.dataloader_num_workers))
    metrics = _start_metrics(run, engine, dtype, progress)

    engine.train()
    while progress.step < run.total_steps:
        seed_dropout(arguments.seed, progress.step, process.rank)
        learning_rate = engine.get_lr()[0]
        for _ in range(run.batch.gradient_accumulation_steps):
            batch = next(loader).to(process.device)
            targets = teacher(batch) if teacher else None
            loss = engine(batch, targets)
            engine.backward(loss)
            metrics.add(distillation.last_parts)
            grad_norm = optimizer_step(engine)
        progress = Progress(progress.step + 1, progress.tokens + batches.count_tokens(progress.step))
        metrics.end_step(progress.step, _epoch(run, progress), progress.tokens, grad_norm, learning_rate)
        if progress.step % arguments.save_steps == 0 or progress.step == run.total_steps:
            metrics.flush()
            checkpoints.save(engine, progress)
    metrics.progress_bar.close()
    _finish(run, engine)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout as a function of (seed, step, rank): a resumed run draws what an uninterrupted one draws."""
    torch.manual_seed(int(philox(seed, step, stream=(DROPOUT_STREAM, rank)).random_raw()))


def _epoch(run: Run, progress: Progress) -> float:
    return progress.step * run.batch.train_batch_size / run.corpus.manifest.counts.train_rows


def _start_metrics(
    run: Run, engine: deepspeed.DeepSpeedEngine, dtype: torch.dtype, progress: Progress
) -> Metrics:
    teacher = model_shape(run.teacher.config) if run.teacher else None
    seq_length = run.corpus.manifest.seq_length
    progress_bar = tqdm(
        total=run.total_steps,
        initial=progress.step,
        desc="distilling" if run.teacher else "training",
        unit="step",
        disable=run.process.rank != 0,
    )
    return Metrics(
        run.arguments.output_dir / "metrics.jsonl",
        engine,
        progress_bar,
        run.arguments.logging_steps,
        flops_per_token=flops_per_token(model_shape(run.student.config), teacher, seq_length),
        peak_flops=measure_matmul_flops(run.process.device, dtype) * run.process.world_size,
        first_step=progress.step,
        first_tokens=progress.tokens,
    )


def _finish(run: Run, engine: deepspeed.DeepSpeedEngine) -> None:
    weights = gather_weights(engine, run.student)
    if run.process.rank == 0:
        metrics = read_metrics(run.arguments.output_dir / "metrics.jsonl")
        plot_losses(metrics, run.arguments.output_dir / "loss.png")
        student = whole_student(run.student, weights)
        record = TrainingRecord(
            arguments=run.arguments,
            deepspeed_config=run.deepspeed_config,
            corpus=run.corpus,
            layers=run.layers,
            world_size=run.process.world_size,
            last_step=metrics[-1],
            held_out=masked_token_quality(
                nn.Module.to(student, run.process.device), run.corpus, HELD_OUT_ROWS_FOR_CARD
            ),
        )
        export_student(student, record, run.arguments.output_dir / "student")
        print(f"student written to {run.arguments.output_dir}/student")
    torch.distributed.barrier()
