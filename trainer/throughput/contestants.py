"""The two trainers that a benchmark compares, each in its own process, and the protocol of such a process.

A process takes the requested number of steps, and answers with the number of real tokens and the time. Our trainer
runs with the environment that ``launch/train.py`` sets (threads that sleep while they wait, large pages). The eager
recipe runs without it, because its users set nothing.
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
# Rows of the corpus that are split into pieces for the eager recipe: enough for a realistic variety of lengths.
EAGER_ROWS = 4096
WARM_UP_STEPS, PROFILED_STEPS = 1, 2
ANSWER = "BENCHMARK "


@dataclass(frozen=True)
class Lap:
    """A number of steps: the real (non-padding) tokens of all ranks, and the seconds that the steps took."""

    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Footprint:
    """Further measurements of a process: memory in bytes, seconds per phase of a step, FLOP/s of a matrix product.

    resident   tensors held between steps: weights, gradients, optimiser states, teacher
    peak       largest size of all tensors at any moment of a step
    compile    "on" if the encoders are compiled, else "off"
    """

    resident: int
    peak: int
    phases: dict[str, float]
    matmul_flops: float
    compile: str


class Contestant(Protocol):
    compile: str

    def steps(self, count: int) -> Lap:
        """Take steps, wait for the device, and time them."""


class Ours:
    """The trainer's own step, as in ``launch/train.py``; created in ``joined_job``."""

    def __init__(self, run: Run) -> None:
        self.run = run = run.agreed_by_ranks()
        self.compile: str = run.arguments.compile
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

    compile: str = "off"

    def __init__(self, run: Run) -> None:
        assert run.teacher is not None
        # cuDNN attention makes a plan for every new shape, and these batches have hundreds: the recipe is faster
        # without it.
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
    """Run a contestant: for each line with a number, take that many steps and print the lap as JSON.

    An empty line asks for the :class:`Footprint`. Only rank 0 prints answers. Each answer starts with ``ANSWER``,
    because libraries print, too.

    Args:
        commands: the lines; None to read standard input.
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
    flops = measure_matmul_flops(device, DTYPES[run.precision])
    return Footprint(resident, peak, seconds, flops, contestant.compile)


def resident_bytes(device: torch.device) -> int:
    """Return the bytes of all live tensors on the device, counting each storage once."""
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
    """Return the largest size in bytes of all tensors at any moment of ``run``, including those held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    return resident + peak_cpu_bytes(run)
