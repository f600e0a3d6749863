"""Profile the losses: time, share of the machine's bandwidth and peak memory, against their peers (public).

``cases`` says what is measured, ``measurement`` how.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from distilspeed.kernels.profiling.cases import build_groups
from distilspeed.kernels.profiling.machine import Machine
from distilspeed.kernels.profiling.measurement import (
    GIGA,
    Case,
    Laps,
    Stopwatch,
    measure_copy_bandwidth,
    measure_peak_memory,
    measure_rounds,
    run_once,
    stopwatch_for,
    trace_round,
)
from distilspeed.kernels.profiling.peers import PEERS
from distilspeed.kernels.profiling.problem import Group, Problem
from distilspeed.kernels.profiling.report import (
    CaseReport,
    Conditions,
    GroupReport,
    Profile,
    Skipped,
)

logger = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# A GPU does a round in tens of milliseconds, two CPU cores in a minute.
DEFAULT_REPEATS = {"cuda": 50, "cpu": 5}
DEFAULT_DTYPE = {"cuda": "fp16", "cpu": "fp32"}
GIB = 2**30
# Tensors as large as the logits that are there at once: the inputs and 7 in the eager recipe (834 MiB for logits of
# 119, November 2026). A GPU that is too small for a peer says so, and the peer is skipped; a CPU's process is killed.
LOGITS_ALIVE = {"cuda": 3, "cpu": 9}
# As large as a projection's input and weight: the inputs, the gradient, and Liger's second one.
PROJECTIONS_ALIVE = 4


class ProfileError(ValueError):
    """Something the caller can put right: ``what is wrong; what to do``."""


@dataclass(frozen=True)
class ProfileSettings:
    """The command line of ``launch/profile_kernels.py``. None: what suits the device.

    Raises:
        ProfileError: a value is out of range, or this machine's device cannot do it.
    """

    tokens: int = 4096
    vocab_size: int = 30522
    hidden_size: int = 768
    temperature: float = 2.0
    dtype: str | None = None
    device: str = "auto"
    repeats: int | None = None
    peers: frozenset[str] = PEERS

    def __post_init__(self) -> None:
        checks = [
            (self.tokens >= 1, "--tokens must be at least 1"),
            (self.vocab_size >= 1, "--vocab_size must be at least 1"),
            (self.hidden_size >= 1, "--hidden_size must be at least 1"),
            (self.repeats is None or self.repeats >= 1, "--repeats must be at least 1"),
            (0 < self.temperature < math.inf, "--temperature must be a positive number"),
            (self.dtype in (None, *DTYPES), f"--dtype must be one of {', '.join(DTYPES)}"),
            (self.device in ("auto", "cpu", "cuda"), "--device must be auto, cpu or cuda"),
            (self.peers <= PEERS, f"--peers must be of {', '.join(sorted(PEERS))}, or none"),
        ]
        for holds, message in checks:
            if not holds:
                raise ProfileError(message)
        self._check_device()

    def _check_device(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ProfileError("--device cuda, and PyTorch sees no GPU; use --device cpu")
        on_gpu, is_bf16 = self.place.type == "cuda", self.problem.dtype == torch.bfloat16
        if on_gpu and is_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ProfileError(f"{torch.cuda.get_device_name()} has no bf16; use --dtype fp16 or fp32")
        needed, there = self._memory_needed(), device_memory(self.place)
        if needed > there:
            raise ProfileError(
                f"this takes about {needed / GIB:,.0f} GiB of memory, and there are {there / GIB:,.0f}; "
                "use fewer --tokens"
            )

    def _memory_needed(self) -> int:
        logits = self.tokens * self.vocab_size
        projections = (self.tokens + self.vocab_size) * self.hidden_size
        entries = LOGITS_ALIVE[self.place.type] * logits + PROJECTIONS_ALIVE * projections
        return entries * self.problem.dtype.itemsize

    @property
    def place(self) -> torch.device:
        """``auto`` is the GPU where there is one."""
        return torch.device("cpu" if self.device == "cpu" or not torch.cuda.is_available() else "cuda")

    @property
    def problem(self) -> Problem:
        return Problem(
            tokens=self.tokens,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            temperature=self.temperature,
            dtype=DTYPES[self.dtype or DEFAULT_DTYPE[self.place.type]],
            device=self.place,
        )

    @property
    def rounds(self) -> int:
        return self.repeats or DEFAULT_REPEATS[self.place.type]


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def profile_kernels(settings: ProfileSettings, trace_file: Path | None = None) -> Profile:
    """Measure every case, in turns.

    Args:
        trace_file: gets a Chrome trace of one more round, after the measured ones.

    Raises:
        ProfileError: the device ran out of memory in a case of ours; a peer is left out, and the report says why.
    """
    problem, stopwatch = settings.problem, stopwatch_for(settings.place)
    machine = Machine.here(problem.device)
    logger.info("copy bandwidth")
    copy_bandwidth = measure_copy_bandwidth(problem.device)
    try:
        groups = [
            warm_up(group, problem.device, stopwatch) for group in build_groups(problem, settings.peers)
        ]
    except torch.OutOfMemoryError as error:
        raise ProfileError(f"{settings.tokens} tokens do not fit in memory; use fewer --tokens") from error
    cases = [case for group in groups for case in group.cases]
    laps = measure_rounds(cases, settings.rounds, stopwatch)
    laps_of = {case.name: of_case for case, of_case in zip(cases, laps, strict=True)}
    if trace_file is not None:
        trace_round(cases, stopwatch, trace_file)
    return Profile(
        groups=tuple(report_group(group, laps_of, copy_bandwidth) for group in groups),
        conditions=Conditions(
            tokens=settings.tokens,
            vocab_size=settings.vocab_size,
            hidden_size=settings.hidden_size,
            dtype=str(problem.dtype).removeprefix("torch."),
            temperature=settings.temperature,
            repeats=settings.rounds,
            copy_bandwidth_gb_per_s=copy_bandwidth,
        ),
        machine=machine,
    )


@dataclass(frozen=True)
class WarmGroup:
    """A group whose cases have run: those that can, their peak memory in bytes, and the peers that cannot."""

    group: Group
    cases: tuple[Case, ...]
    peak_memory: tuple[int, ...]
    skipped: tuple[Skipped, ...]


def warm_up(group: Group, device: torch.device, stopwatch: Stopwatch) -> WarmGroup:
    """Run each case twice, so that everything is compiled and loaded; the second time for its memory."""
    cases, peak_memory, skipped = [], [], []
    for case in group.cases:
        logger.info("%s: warming up %s", group.name, case.name)
        try:
            run_once(case, stopwatch)
            peak = measure_peak_memory(case, device)
        except Exception as error:  # a peer's code: it may be missing, not compile, or run out of memory
            if not case.peers:
                raise
            skipped.append(Skipped(case.name, case.computes, reason=first_line(error)))
        else:
            cases.append(case)
            peak_memory.append(peak)
    return WarmGroup(group, tuple(cases), tuple(peak_memory), tuple(skipped))


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def report_group(
    warm: WarmGroup, laps_of: Mapping[str, Sequence[Laps]], copy_bandwidth: float
) -> GroupReport:
    """Compare a group's cases with its roof and with its first case."""
    ours, roof = warm.cases[0], copy_bandwidth
    if warm.group.roof is not None:
        [bare] = [case for case in warm.cases if case.name == warm.group.roof]
        roof = bare.floor.both / median(lap.both for lap in laps_of[bare.name]) / GIGA
    return GroupReport(
        name=warm.group.name,
        inputs=warm.group.inputs,
        unit=warm.group.unit,
        roof=roof,
        roof_is=warm.group.roof or "copy bandwidth",
        cases=tuple(
            CaseReport.of(case, laps_of[case.name], laps_of[ours.name], roof, peak)
            for case, peak in zip(warm.cases, warm.peak_memory, strict=True)
        ),
        skipped=warm.skipped,
    )
