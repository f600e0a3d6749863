"""``--plan``: print what a run will need, without training; an error if the run does not fit the GPU's memory."""

import torch

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.training.memory import GIB, MemoryPlan, estimate_memory
from distilspeed.trainer.training.run import Run

# Memory beyond the tensors: CUDA context, library workspaces, fragmentation. An allowance, not measured.
RESERVE_BYTES = GIB


def print_plan(run: Run) -> None:
    """Print the batch equation, FLOPs per step and estimated memory per GPU; rank 0 only.

    Raises:
        UserError: the memory of the GPU (``--gpu_memory``, or the local GPU's) is too small; names the largest
            micro-batch that fits.
    """
    tokens_per_step = run.batch.train_batch_size * run.corpus.manifest.seq_length
    flops = run.flops_per_token() * tokens_per_step
    memory = plan_memory(run, run.batch)
    if run.process.rank == 0:
        parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in vars(memory).items())
        epochs = run.total_steps * run.batch.train_batch_size / run.corpus.manifest.counts.train_rows
        print(
            f"batch:   {run.batch}\n"
            f"steps:   {run.total_steps} of {tokens_per_step:,} tokens, "
            f"{epochs:.2f} epochs of {run.corpus.manifest.counts.train_rows:,} rows\n"
            f"FLOPs:   {flops:.3g} per step, {flops * run.total_steps:.3g} in all\n"
            f"memory:  {memory.total / GIB:.2f} GiB of tensors per GPU, estimated, {run.precision}, "
            f"ZeRO-{run.deepspeed_config.zero_stage} ({parts})"
        )
    _check_fits(run, memory)


def plan_memory(run: Run, batch: BatchEquation) -> MemoryPlan:
    """Estimate the memory of a run, with its own batch equation or another."""
    config = run.student.config
    # fp16 does not train on a CPU, so a plan in fp16 is for a GPU.
    on_cpu = run.process.device.type == "cpu" and run.precision != "fp16"
    return estimate_memory(
        *run.shapes(),
        batch,
        run.corpus.manifest.seq_length,
        run.deepspeed_config,
        teacher_zero3=run.arguments.teacher_zero3,
        head_share=run.objective.head_share,
        on_cpu=on_cpu,
        attention_dropout=family_of(config).attention_dropout(config),
    )


def _check_fits(run: Run, memory: MemoryPlan) -> None:
    card = _card_bytes(run)
    if card is None or memory.total + RESERVE_BYTES <= card:
        return
    batch = run.batch
    fitting = [
        micro
        for micro in range(batch.micro_batch_size - 1, 0, -1)
        if batch.train_batch_size % (micro * batch.world_size) == 0
        and plan_memory(run, _with_micro_batch(batch, micro)).total + RESERVE_BYTES <= card
    ]
    advice = (
        f"a micro-batch of {fitting[0]} fits (train_micro_batch_size_per_gpu)"
        if fitting
        else "raise the ZeRO stage, offload, or shard the teacher (--teacher_zero3)"
    )
    raise UserError(
        "out-of-memory",
        f"the plan needs {memory.total / GIB:.1f} GiB for tensors and about {RESERVE_BYTES / GIB:.0f} GiB of reserve, "
        f"but the GPU has {card / GIB:.1f} GiB; {advice}",
    )


def _with_micro_batch(batch: BatchEquation, micro: int) -> BatchEquation:
    accumulation = batch.train_batch_size // (micro * batch.world_size)
    return BatchEquation(batch.train_batch_size, micro, accumulation, batch.world_size)


def _card_bytes(run: Run) -> int | None:
    if run.arguments.gpu_memory is not None:
        return int(run.arguments.gpu_memory * GIB)
    device = run.process.device
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
