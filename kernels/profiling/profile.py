"""Profile the losses against their peers: time, share of the machine's bandwidth, peak memory (public).

``cases`` defines the cases, ``measurement`` measures them.
"""

import logging
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
from distilspeed.kernels.profiling.problem import Group
from distilspeed.kernels.profiling.report import (
    CaseReport,
    GroupReport,
    Profile,
    ProfileConditions,
    Skipped,
)
from distilspeed.kernels.profiling.settings import ProfileError, ProfileSettings

logger = logging.getLogger(__name__)


def profile_kernels(settings: ProfileSettings, trace_file: Path | None = None) -> Profile:
    """Measure all cases, taking turns. A peer that fails is skipped, and the report gives the reason.

    Args:
        trace_file: if given, write a Chrome trace of one more round to this file after measuring.

    Raises:
        ProfileError: the device ran out of memory for the inputs or in a case of ours.
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
        raise ProfileError(f"--tokens {settings.tokens} does not fit in memory; use fewer") from error
    cases = [case for group in groups for case in group.cases]
    laps = measure_rounds(cases, settings.rounds, stopwatch)
    laps_of = {case.name: of_case for case, of_case in zip(cases, laps, strict=True)}
    if trace_file is not None:
        trace_round(cases, stopwatch, trace_file)
    return Profile(
        groups=tuple(report_group(group, laps_of, copy_bandwidth) for group in groups),
        conditions=ProfileConditions(
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
    """A group after warm-up: the cases that run, their peak memory in bytes, and the peers that failed."""

    group: Group
    cases: tuple[Case, ...]
    peak_memory: tuple[int, ...]
    skipped: tuple[Skipped, ...]


def warm_up(group: Group, device: torch.device, stopwatch: Stopwatch) -> WarmGroup:
    """Run each case twice: first to compile and load everything, then to measure peak memory."""
    cases, peak_memory, skipped = [], [], []
    for case in group.cases:
        logger.info("%s: warming up %s", group.name, case.name)
        try:
            run_once(case, stopwatch)
            peak = measure_peak_memory(case, device)
        except Exception as error:  # a peer may be missing, fail to compile, or run out of memory
            if not case.peers:
                raise
            skipped.append(Skipped(case.name, case.computes, reason=skip_reason(error)))
        else:
            cases.append(case)
            peak_memory.append(peak)
    return WarmGroup(group, tuple(cases), tuple(peak_memory), tuple(skipped))


def skip_reason(error: Exception) -> str:
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
