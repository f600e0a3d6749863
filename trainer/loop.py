"""The training loop, and the student that comes out of it."""

import deepspeed
import torch.distributed
from torch import nn
from tqdm import tqdm

from distilspeed.trainer.batches import MicroBatches, on_device
from distilspeed.trainer.checkpoint import Checkpoints, Progress
from distilspeed.trainer.engines import DTYPES, join_job
from distilspeed.trainer.evaluation import masked_token_quality
from distilspeed.trainer.export import TrainingRecord, export_student, gather_weights, whole_student
from distilspeed.trainer.flops import measure_matmul_flops
from distilspeed.trainer.metrics import Metrics, plot_losses, read_metrics
from distilspeed.trainer.optimizers import describe_fused_parts
from distilspeed.trainer.run import Run, record_run, settle_attention
from distilspeed.trainer.step import TrainingStep

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
    resuming = checkpoints.any()
    batches = MicroBatches(run.corpus, run.batch, process.rank, arguments.seed)
    attention = settle_attention(run, batches, resuming)
    record_run(run, attention, resuming)

    step = TrainingStep(run)
    engine = step.engine
    if process.rank == 0:
        print(describe_fused_parts(engine))
    progress = checkpoints.resume(engine) if resuming else Progress()

    loader = on_device(
        batches.loader(progress.step, run.total_steps, arguments.dataloader_num_workers), process.device
    )
    metrics = _start_metrics(run, engine, progress)

    while progress.step < run.total_steps:
        learning_rate = engine.get_lr()[0]
        shares, grad_norm = step.take(progress.step, loader)
        progress = Progress(progress.step + 1, progress.tokens + batches.count_tokens(progress.step))
        metrics.end_step(
            progress.step, _epoch(run, progress), progress.tokens, shares, grad_norm, learning_rate
        )
        if progress.step % arguments.save_steps == 0 or progress.step == run.total_steps:
            metrics.flush()
            checkpoints.save(engine, progress)
    metrics.progress_bar.close()
    _finish(run, engine)


def _epoch(run: Run, progress: Progress) -> float:
    return progress.step * run.batch.train_batch_size / run.corpus.manifest.counts.train_rows


def _start_metrics(run: Run, engine: deepspeed.DeepSpeedEngine, progress: Progress) -> Metrics:
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
        flops_per_token=run.flops_per_token(),
        peak_flops=measure_matmul_flops(run.process.device, DTYPES[run.precision]) * run.process.world_size,
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
