"""A job that counts how often training steps wait for a value from the device; on a GPU CUDA reports the waits.

python step_job.py CONFIG TEACHER CORPUS OUTPUT      prints {"1": [waits], "4": [waits]}, by accumulation steps

This job adds one wait at the end of each list, to prove that waits are counted.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distilspeed.trainer.data.batches import MicroBatches, on_device
from distilspeed.trainer.job.ranks import joined_job, this_process
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.run import prepare_run, settle_attention
from distilspeed.trainer.training.step import TrainingStep

# Operators whose result, or its shape, the host must read before it can continue.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
ON_CPUS_ONLY = (
    "distillation_loss_chunked.py",
    "distillation_loss_cpp.py",
    "cosine_loss_chunked.py",
    "cosine_loss_cpp.py",
    "distillation_loss_ops.py",
)
MICRO_BATCH = 4
WARM_UP_STEPS = 3


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if any(name.startswith(waiting) for waiting in WAITING):
            stack = traceback.extract_stack()
            # The losses for CPUs read values; the kernels for GPUs do not.
            if not any(Path(frame.filename).name in ON_CPUS_ONLY for frame in stack):
                caller = next(frame for frame in reversed(stack[:-1]) if "torch/" not in frame.filename)
                self.names.append(f"{name} in {Path(caller.filename).name}:{caller.lineno}")
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_of_operators() -> Iterator[list[str]]:
    with Waits() as waits:
        yield waits.names


@contextmanager
def waits_for_the_gpu() -> Iterator[list[str]]:
    names: list[str] = []
    with (
        warnings.catch_warnings(record=True) as warned,
        mock.patch.object(torch.cuda, "synchronize") as synchronize,
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield names
        torch.cuda.set_sync_debug_mode("default")
    names += ["torch.cuda.synchronize"] * synchronize.call_count
    for warning in warned:
        if "synchronizing CUDA operation" in str(warning.message):
            names.append(f"synchronisation in {Path(warning.filename).name}:{warning.lineno}")


def waits_of_a_step(accumulation: int, arguments: list[str]) -> list[str]:
    config, teacher, corpus, output = arguments
    run = prepare_run(
        TrainArguments(
            deepspeed_config=Path(config),
            teacher=teacher,
            data_dir=Path(corpus),
            output_dir=Path(output),
            max_steps=10,
            train_batch_size=MICRO_BATCH * accumulation,
            per_device_train_batch_size=MICRO_BATCH,
        )
    )
    run = run.agreed_by_ranks()
    batches = MicroBatches(run.corpus, run.batch, 0, seed=0)
    settle_attention(run, batches)
    step = TrainingStep(run)
    micro_batches = on_device(
        iter([batches[i] for i in range((WARM_UP_STEPS + 1) * accumulation)]), run.process.device
    )
    for index in range(WARM_UP_STEPS):  # allocates states and buffers, and starts DeepSpeed's timers
        step.take(index, micro_batches)
    counted = waits_for_the_gpu() if run.process.device.type == "cuda" else waits_of_operators()
    with counted as names:
        step.take(WARM_UP_STEPS, micro_batches)
        torch.ones((), device=run.process.device).item()
    return names


if __name__ == "__main__":
    with joined_job(this_process()):
        print(
            json.dumps({accumulation: waits_of_a_step(accumulation, sys.argv[1:]) for accumulation in (1, 4)})
        )
