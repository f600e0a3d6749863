"""The two ways to train that a benchmark compares, each in a process of its own, and what such a process tells.

A process takes as many steps as it is told, and answers how many real tokens it saw and how long that took. It has
its way's own environment: what ``launch/train.py`` sets for ours (threads that sleep, large pages), nothing for the
eager recipe, whose users set nothing.
"""

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from torch import nn

from distilspeed.kernels.profiling.measurement import peak_cpu_bytes
from distilspeed.trainer.data.batches import MicroBatches, on_device, resolve_num_workers
from distilspeed.trainer.engine.phases import PhaseProfile
from distilspeed.trainer.engine.student import DTYPES
from distilspeed.trainer.job.ranks import joined_job
from distilspeed.trainer.models.flops import measure_matmul_flops
from distilspeed.trainer.throughput.eager_recipe import BucketedPieces, EagerRecipe
from distilspeed.trainer.training.run import Run, settle_attention
from distilspeed.trainer.training.step import TrainingStep

OURS, EAGER = "ours", "eager"
# So many rows of the corpus are cut into pieces for the eager recipe: enough for real variety of lengths.
EAGER_ROWS = 4096
WARM_UP_STEPS, PROFILED_STEPS = 1, 2
ANSWER = "BENCHMARK "


@dataclass(frozen=True)
class Lap:
    """Some steps: the real (non-padding) tokens of all ranks, and the seconds that they took."""

    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Footprint:
    """What a process tells besides: memory in bytes, seconds of the phases of one step, FLOP/s of a matrix product.

    resident   tensors held between steps: weights, gradients, optimiser states, teacher
    peak       the most bytes of tensors held at any moment of a step
    """

    resident: int
    peak: int
    phases: dict[str, float]
    matmul_flops: float


class Contestant(Protocol):
    def steps(self, count: int) -> Lap:
        """Take steps, wait for the device, and time them."""


class Ours:
    """The trainer's own step, as ``launch/train.py`` takes it; made in ``joined_job``."""

    def __init__(self, run: Run) -> None:
        self.run = run = run.with_optimizer_settled()
        self.batches = MicroBatches(run.corpus, run.batch, run.process.rank, run.arguments.seed)
        settle_attention(run, self.batches)
        self.step = TrainingStep(run)
        num_workers = resolve_num_workers(run.arguments.dataloader_num_workers, run.process.device)
        loader = self.batches.loader(0, None, num_workers)
        self.micro_batches = on_device(loader, run.process.device)
        self.taken = 0

    def steps(self, count: int) -> Lap:
        torch.distributed.barrier()
        start = time.perf_counter()
        tokens = 0
        for _ in range(count):
            parts = self.step.take(self.taken, self.micro_batches).parts
            tokens += self.batches.count_tokens(self.taken)
            self.taken += 1
        if not torch.isfinite(parts).all():  # read once, as a logging interval does
            raise FloatingPointError("the loss is not finite")
        torch.distributed.barrier()
        return Lap(tokens, time.perf_counter() - start)


class Eager:
    """The original recipe; see eager_recipe.py."""

    def __init__(self, run: Run) -> None:
        assert run.teacher is not None
        # Which makes a plan for every new shape, and these batches have hundreds: without, the recipe is faster.
        torch.backends.cuda.enable_cudnn_sdp(False)
        device, dtype = run.process.device, DTYPES[run.precision]
        rows = min(EAGER_ROWS, len(run.corpus.train))
        tokens = run.batch.micro_batch_size * run.corpus.manifest.seq_length
        self.recipe = EagerRecipe(
            nn.Module.to(run.student, device).train(),
            nn.Module.to(run.teacher, device).eval(),
            BucketedPieces(run.corpus, rows, tokens, run.arguments.seed),
            run.batch.gradient_accumulation_steps,
            device,
            dtype,
        )

    def steps(self, count: int) -> Lap:
        start = time.perf_counter()
        tokens = sum(self.recipe.step()[0] for _ in range(count))
        return Lap(tokens, time.perf_counter() - start)


def serve(name: str, run: Run, commands: Iterable[str] | None = None) -> None:
    """Be a contestant: for every line that holds a number take so many steps, and print the lap as JSON.

    An empty line asks for the :class:`Footprint`. On rank 0 alone lines are printed, each behind ``ANSWER``, because
    libraries print, too.

    Args:
        commands: None: standard input.
    """
    with joined_job(run.process) if name == OURS else nullcontext():
        contestant: Contestant = Ours(run) if name == OURS else Eager(run)
        contestant.steps(WARM_UP_STEPS)
        for command in itertools.chain([str(1)], sys.stdin if commands is None else commands):
            answer: Any = contestant.steps(int(command)) if command.strip() else footprint(contestant, run)
            if run.process.rank == 0:
                print(f"\n{ANSWER}{json.dumps(asdict(answer))}", flush=True)


def footprint(contestant: Contestant, run: Run) -> Footprint:
    device = run.process.device
    resident = resident_bytes(device)
    peak = peak_bytes(lambda: contestant.steps(1), device, resident)
    with PhaseProfile() as phases:
        contestant.steps(PROFILED_STEPS)
    seconds = {name: time / PROFILED_STEPS for name, time in phases.seconds.items()}
    return Footprint(resident, peak, seconds, measure_matmul_flops(device, DTYPES[run.precision]))


def resident_bytes(device: torch.device) -> int:
    """Bytes of all tensors alive on the device, each storage once."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    storages = {
        storage.data_ptr(): storage.nbytes()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu"
        for storage in [thing.untyped_storage()]
    }
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device, resident: int) -> int:
    """The most bytes of tensors held at any moment of ``run``, those held before included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    return resident + peak_cpu_bytes(run)
