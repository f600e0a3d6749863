"""Measure on one device: copy bandwidth, times of forward and backward, peak memory."""

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

# Two buffers of this size exceed a server's last-level cache, so a copy goes through memory.
COPY_BUFFER_BYTES = 512 * 2**20
COPY_REPEATS = 10
GIGA = 1e9
# Written before every run on a GPU. Larger than any L2 cache, and written often enough to keep the GPU busy for half
# a millisecond or more (at 4 TB/s), while the host queues the measured kernels.
FLUSH_BYTES, FLUSHES = 512 * 2**20, 4


def gradients(inputs: Tensors, outputs: Tensors) -> Tensors:
    """Return the gradients of a loss, the only output, with respect to each input."""
    return torch.autograd.grad(outputs, inputs)


@dataclass(frozen=True)
class Floor:
    """The least work of forward and backward: bytes moved, or floating-point operations."""

    forward: int
    backward: int

    @property
    def both(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Case:
    """One way to compute a loss and its gradients.

    name      unique among all cases
    computes  a description in one line
    floor     the least work that any implementation must do
    prepare   makes the inputs of forward; neither timed nor counted as memory
    forward   inputs, as arguments -> outputs; for a loss, the scalar
    backward  inputs, outputs of forward -> gradients
    peers     other projects' code that the case needs; it may fail to run here
    """

    name: str
    computes: str
    floor: Floor
    prepare: Callable[[], Tensors]
    forward: Callable[..., Tensors]
    backward: Callable[[Tensors, Tensors], Tensors] = gradients
    peers: frozenset[str] = frozenset()


class Laps(NamedTuple):
    """Seconds of forward and backward in one run; backward follows forward at once."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Stopwatch(Protocol):
    def start(self) -> None:
        """Get the device ready and start the first lap."""

    def lap(self) -> None:
        """End the current lap and start the next."""

    def laps(self) -> list[float]:
        """Wait for the device and return the seconds of every lap since the start."""


class CpuStopwatch:
    """Wall-clock time."""

    def start(self) -> None:
        self._marks = [time.perf_counter()]

    def lap(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        return [end - begin for begin, end in pairwise(self._marks)]


class CudaStopwatch:
    """Time on the GPU, between events in its stream; each start clears the L2 cache.

    The host's time to launch kernels counts only if the GPU waits for it, for example after a synchronisation.
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
    """Return the bytes read and written per second by a copy from one large tensor to another, in GB/s.

    Uses all of PyTorch's threads on a CPU. The best of several copies, as in STREAM (McCalpin 1995), so that other
    processes on the machine disturb it least.
    """
    source = torch.ones(buffer_bytes // torch.float32.itemsize, device=device)
    target = torch.ones_like(source)  # written once, so that no timed copy pays for page faults
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
    # After timing: freeing the gradients is not part of the loss's time.
    del results
    return Laps(forward, backward)


def measure_rounds(cases: Sequence[Case], repeats: int, stopwatch: Stopwatch) -> list[list[Laps]]:
    """Run all cases in turn, ``repeats`` times, so that other load on the machine affects all cases alike.

    Every round has another random order, so that no case always finds its inputs in the cache of the case before.

    Returns:
        For each case its laps, one per round; laps of one round have the same index.
    """
    laps: list[list[Laps]] = [[] for _ in cases]
    for number in range(repeats):
        logger.info("round %d of %d", number + 1, repeats)
        for index in random.Random(number).sample(range(len(cases)), len(cases)):
            laps[index].append(run_once(cases[index], stopwatch))
    return laps


def measure_peak_memory(case: Case, device: torch.device) -> int:
    """Return the peak bytes of forward and backward, gradients included, inputs excluded."""
    inputs = case.prepare()
    gc.collect()  # garbage that is freed during the measurement would reduce the result

    def run() -> Tensors:
        return case.backward(inputs, case.forward(*inputs))

    return peak_cuda_bytes(run, device) if device.type == "cuda" else peak_cpu_bytes(run)


def peak_cuda_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of PyTorch's CUDA allocator during ``run``, minus the bytes allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def peak_cpu_bytes(run: Callable[[], object]) -> int:
    """Return the exact peak bytes of PyTorch's CPU allocator during ``run``.

    All tensors are counted. Scratch memory of the matrix-product library and C++ containers are not: they do not
    use this allocator.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Held until the profiler has stopped, as measured runs hold their gradients.
        results = run()
    del results
    # The profiler's own tables sum allocations by operator and lose their order.
    session = profiler.profiler
    if session is None or session.kineto_results is None:
        raise RuntimeError("PyTorch's profiler recorded nothing; stop any other profiler in this process")
    allocations = _allocations(session.kineto_results.experimental_event_tree())
    sizes: dict[int, int] = {}  # by address
    in_use = peak = 0
    for allocation in sorted(allocations, key=attrgetter("time")):
        # Memory from before the run does not count. The profiler still records its release, if an earlier session saw
        # another allocation at the same address.
        in_use -= sizes.pop(allocation.address, 0)
        if allocation.size > 0:
            sizes[allocation.address] = allocation.size
            in_use += allocation.size
            peak = max(peak, in_use)
    return peak


class _Allocation(NamedTuple):
    time: int  # ns
    address: int
    size: int  # bytes; negative when memory is freed


def _allocations(events: Iterable[_ProfilerEvent]) -> Iterator[_Allocation]:
    for event in events:
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation):
            yield _Allocation(event.start_time_ns, fields.ptr, fields.alloc_size)
        yield from _allocations(event.children)


def trace_round(cases: Iterable[Case], stopwatch: Stopwatch, path: Path) -> None:
    """Write a Chrome trace of one round (for Perfetto or chrome://tracing): JSON, one span per case."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for case in cases:
            with record_function(case.name):
                run_once(case, stopwatch)
    profiler.export_chrome_trace(str(path))
