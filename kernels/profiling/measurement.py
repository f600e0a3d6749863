"""Measuring on one device: copy bandwidth, times of forward and backward, peak memory."""

import gc
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]

# Two buffers of this size are more than the last-level cache of a server, so that a copy goes through memory.
COPY_BUFFER_BYTES = 512 * 2**20
COPY_REPEATS = 10
GIGA = 1e9
# Written before every run on a GPU: more than any L2 cache holds, and so often that the GPU is busy for half a
# millisecond or more (at 4 TB/s), in which the host queues what is measured.
FLUSH_BYTES, FLUSHES = 512 * 2**20, 4


def gradients(inputs: Tensors, outputs: Tensors) -> Tensors:
    """Backward of a loss: the gradients of the one output with respect to each input."""
    return torch.autograd.grad(outputs, inputs)


@dataclass(frozen=True)
class Floor:
    """The least work that forward and backward have to do: bytes moved, or floating-point operations."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Case:
    """One way to compute a loss and its gradients.

    name      unique among all cases
    computes  what exactly, in one line
    floor     the work that no implementation of this can do without
    prepare   makes what forward differentiates by; neither timed nor counted as memory
    forward   those, as arguments -> what backward starts from, for a loss the scalar alone
    backward  inputs, outputs of forward -> gradients
    peers     what it is made of that is not ours and may be unable to run here
    """

    name: str
    computes: str
    floor: Floor
    prepare: Callable[[], Tensors]
    forward: Callable[..., Tensors]
    backward: Callable[[Tensors, Tensors], Tensors] = gradients
    peers: frozenset[str] = frozenset()


class Laps(NamedTuple):
    """Seconds of one run, forward and backward one right after the other."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Stopwatch(Protocol):
    def start(self) -> None:
        """Get the device ready and start the first lap."""

    def lap(self) -> None:
        """End a lap and start the next."""

    def laps(self) -> list[float]:
        """Seconds of every lap since the start, once the device is done with them."""


class CpuStopwatch:
    """Wall-clock time."""

    def start(self) -> None:
        self._marks = [time.perf_counter()]

    def lap(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        return [end - begin for begin, end in pairwise(self._marks)]


class CudaStopwatch:
    """Time on the GPU, between events in its stream; each start finds nothing of use in the L2 cache.

    What the host takes to launch kernels counts only where the GPU waits for it, as after a synchronisation.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def start(self) -> None:
        for _ in range(FLUSHES):
            self._flush.zero_()
        self._events = [_recorded_event()]

    def lap(self) -> None:
        self._events.append(_recorded_event())

    def laps(self) -> list[float]:
        self._events[-1].synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._events)]


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def stopwatch_for(device: torch.device) -> Stopwatch:
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


def measure_copy_bandwidth(device: torch.device, buffer_bytes: int = COPY_BUFFER_BYTES) -> float:
    """Bytes read and written per second by a copy from one large tensor to another, in GB/s.

    With all of PyTorch's threads on a CPU. The best of several copies, as in STREAM (McCalpin 1995): what the
    memory can do, whatever else runs on the machine.
    """
    source = torch.ones(buffer_bytes // torch.float32.itemsize, device=device)
    target = torch.ones_like(source)  # written, so that no copy waits for the system to find its pages
    stopwatch = stopwatch_for(device)
    seconds = []
    for _ in range(COPY_REPEATS):
        stopwatch.start()
        target.copy_(source)
        stopwatch.lap()
        seconds += stopwatch.laps()
    return 2 * source.nbytes / min(seconds) / GIGA


def run_once(case: Case, stopwatch: Stopwatch) -> Laps:
    inputs = case.prepare()
    stopwatch.start()
    outputs = case.forward(*inputs)
    stopwatch.lap()
    results = case.backward(inputs, outputs)
    stopwatch.lap()
    forward, backward = stopwatch.laps()
    # Not before: freeing the gradients is the next step's business, not the loss's.
    del results
    return Laps(forward, backward)


def measure_rounds(cases: Sequence[Case], repeats: int, stopwatch: Stopwatch) -> list[list[Laps]]:
    """Run all cases in turn, ``repeats`` times, so that what disturbs the machine disturbs all of them.

    Every round has another order: no case always comes after the one that leaves its inputs in the cache.

    Returns:
        For each case its laps, one a round: those of one round, at the same index, belong together.
    """
    laps: list[list[Laps]] = [[] for _ in cases]
    for number in range(repeats):
        logger.info("round %d of %d", number + 1, repeats)
        for index in random.Random(number).sample(range(len(cases)), len(cases)):
            laps[index].append(run_once(cases[index], stopwatch))
    return laps


def measure_peak_memory(case: Case, device: torch.device) -> int:
    """The most bytes that forward and backward hold at one time, gradients included, inputs not."""
    inputs = case.prepare()
    gc.collect()  # what is freed while measuring would be taken off

    def run() -> Tensors:
        return case.backward(inputs, case.forward(*inputs))

    return peak_cuda_bytes(run, device) if device.type == "cuda" else peak_cpu_bytes(run)


def peak_cuda_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch's CUDA allocator gave out at one time during ``run``, beyond those before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_cpu_bytes(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator gave out at one time during ``run``, to the byte.

    Every tensor's memory comes from there. Scratch memory inside the matrix-product library and the C++
    standard library's containers do not, and are not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Held until the profiler has stopped, as measured runs hold their gradients.
        results = run()
    del results
    # The profiler's own tables add allocations up by operator, and lose their order.
    session = profiler.profiler
    if session is None or session.kineto_results is None:
        raise RuntimeError("the profiler recorded nothing; is another one running?")
    allocations = _allocations(session.kineto_results.experimental_event_tree())
    sizes: dict[int, int] = {}  # by address
    in_use = peak = 0
    for allocation in sorted(allocations, key=attrgetter("time")):
        # What was there before is no part of the run; yet the profiler notes that it is freed, if an earlier session
        # saw something else allocated at its address.
        in_use -= sizes.pop(allocation.address, 0)
        if allocation.size > 0:
            sizes[allocation.address] = allocation.size
            in_use += allocation.size
            peak = max(peak, in_use)
    return peak


class _Allocation(NamedTuple):
    time: int  # ns
    address: int
    size: int  # bytes, below zero where they are freed


def _allocations(events: Iterable[_ProfilerEvent]) -> Iterator[_Allocation]:
    for event in events:
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation):
            yield _Allocation(event.start_time_ns, fields.ptr, fields.alloc_size)
        yield from _allocations(event.children)


def trace_round(cases: Iterable[Case], stopwatch: Stopwatch, path: Path) -> None:
    """Write one round as a Chrome trace (for Perfetto or chrome://tracing): JSON, a span for each case."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for case in cases:
            with record_function(case.name):
                run_once(case, stopwatch)
    profiler.export_chrome_trace(str(path))
