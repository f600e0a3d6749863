"""The results of a profile, as a table, profile.json and roofline.png."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from distilspeed.kernels.profiling.machine import Machine
from distilspeed.kernels.profiling.measurement import GIGA, Case, Laps

MIB = 2**20
# Okabe & Ito 2008: distinct under every common colour blindness, and in grey.
OWN_COLOUR, PEER_COLOUR, ROOF_COLOUR = "#0072B2", "#E69F00", "#999999"


@dataclass(frozen=True)
class PhaseReport:
    """Forward, backward or both of one case, over the rounds.

    floor          the least work: bytes or floating-point operations, by the group's unit
    rate           floor / median time, in the group's unit; None if the floor is 0
    share_of_roof  rate / the group's roof (0 to 1, above 1 if caches help)
    ratio_to_ours  time / time of the group's first case in the same round, median over the rounds
    """

    median_ms: float
    min_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    floor: int
    rate: float | None
    share_of_roof: float | None
    ratio_to_ours: float

    @classmethod
    def of(
        cls, seconds: Sequence[float], our_seconds: Sequence[float], floor: int, roof: float
    ) -> "PhaseReport":
        quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        first, second, third = torch.tensor(seconds, dtype=torch.float64).quantile(quarters).tolist()
        rate = floor / second / GIGA if floor else None
        return cls(
            median_ms=1000 * second,
            min_ms=1000 * min(seconds),
            first_quartile_ms=1000 * first,
            third_quartile_ms=1000 * third,
            floor=floor,
            rate=rate,
            share_of_roof=None if rate is None else rate / roof,
            ratio_to_ours=median(time / ours for time, ours in zip(seconds, our_seconds, strict=True)),
        )


@dataclass(frozen=True)
class CaseReport:
    """The results of one case; peak memory includes gradients and excludes inputs."""

    name: str
    computes: str
    is_peer: bool
    forward: PhaseReport
    backward: PhaseReport
    both: PhaseReport
    peak_memory_bytes: int

    @classmethod
    def of(
        cls, case: Case, laps: Sequence[Laps], our_laps: Sequence[Laps], roof: float, peak_memory_bytes: int
    ) -> "CaseReport":
        phases = {
            name: PhaseReport.of(
                [getattr(lap, name) for lap in laps],
                [getattr(lap, name) for lap in our_laps],
                getattr(case.floor, name),
                roof,
            )
            for name in ("forward", "backward", "both")
        }
        return cls(
            name=case.name,
            computes=case.computes,
            is_peer=bool(case.peers),
            peak_memory_bytes=peak_memory_bytes,
            **phases,
        )


@dataclass(frozen=True)
class Skipped:
    """A peer that failed to run here, and the reason."""

    name: str
    computes: str
    reason: str


@dataclass(frozen=True)
class GroupReport:
    """The results of a group, our case first. ``roof``: the highest attainable rate, in ``unit``."""

    name: str
    inputs: str
    unit: str
    roof: float
    roof_is: str
    cases: tuple[CaseReport, ...]
    skipped: tuple[Skipped, ...]

    def table(self) -> str:
        """Return the cases as a Markdown table, one row per case."""
        headings = ["case", "forward ms", "backward ms", "both ms", self.unit, f"of {self.roof_is}"]
        headings += ["peak memory MiB", "time / ours"]
        rows = [_cells(case) for case in self.cases]
        rows += [[case.name, f"not run: {case.reason}", *[""] * (len(headings) - 2)] for case in self.skipped]
        # A long reason must not widen the column of times.
        columns = zip(headings, *rows[: len(self.cases)], strict=True)
        widths = [max(map(len, column)) for column in columns]
        widths[0] = max([widths[0], *(len(case.name) for case in self.skipped)])
        lines = [headings, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]
        return "\n".join(f"| {_aligned(line, widths)} |" for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])


def _cells(case: CaseReport) -> list[str]:
    rate, share = case.both.rate, case.both.share_of_roof
    return [
        case.name,
        *(_times(phase) for phase in (case.forward, case.backward, case.both)),
        "–" if rate is None else f"{rate:,.1f}",
        "–" if share is None else f"{100 * share:.0f} %",
        f"{case.peak_memory_bytes / MIB:,.1f}",
        f"{case.both.ratio_to_ours:.2f}×",
    ]


def _times(phase: PhaseReport) -> str:
    return f"{phase.median_ms:,.2f} [{phase.first_quartile_ms:,.2f}, {phase.third_quartile_ms:,.2f}]"


@dataclass(frozen=True)
class ProfileConditions:
    """The settings of a profile, and the measured copy bandwidth."""

    tokens: int
    vocab_size: int
    hidden_size: int
    dtype: str
    temperature: float
    repeats: int
    copy_bandwidth_gb_per_s: float


@dataclass(frozen=True)
class Profile:
    groups: tuple[GroupReport, ...]
    conditions: ProfileConditions
    machine: Machine

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Return a table per group, and a legend."""
        groups = [f"{group.name}: {group.inputs}\n{group.table()}" for group in self.groups]
        reading = (
            f"Median [quartiles] of {self.conditions.repeats} rounds, cases taking turns. Rates: least work of "
            "forward and backward / time of both. Copy bandwidth (bytes read and written): "
            f"{self.conditions.copy_bandwidth_gb_per_s:.1f} GB/s. Peak memory: with gradients, without inputs. "
            f"time / ours: median of the rounds' ratios.\n{self.machine}"
        )
        return "\n\n".join([*groups, reading])


def write_profile(profile: Profile, folder: Path) -> None:
    """Write profile.json and roofline.png to the existing ``folder``."""
    (folder / "profile.json").write_text(profile.to_json(), encoding="utf-8")
    draw_roofline(profile, folder / "roofline.png")


def draw_roofline(profile: Profile, path: Path) -> None:
    """Draw each case's rate against its group's roof, one panel per group; PNG."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [len(group.cases) for group in profile.groups]
    figure = Figure(figsize=(10, 1 + len(heights) + 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=[height + 1 for height in heights])
    for axes, group in zip(panels[:, 0], profile.groups, strict=True):
        rates = [case.both.rate or 0.0 for case in group.cases]
        shares = [100 * (case.both.share_of_roof or 0.0) for case in group.cases]
        colours = [_colour(case, group) for case in group.cases]
        bars = axes.barh([case.name for case in group.cases], rates, color=colours)
        labels = [f"{_short(rate)} ({share:.0f} %)" for rate, share in zip(rates, shares, strict=True)]
        # White background: the roof's line crosses the label of a rate just below it.
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.bar_label(bars, labels=labels, padding=4, bbox=background, zorder=3)
        axes.axvline(group.roof, color="black", linewidth=1, linestyle="--")
        axes.set(
            title=f"{group.name} {group.inputs}",
            xlabel=f"{group.unit}, least work / time; dashed: {group.roof_is}, {_short(group.roof)}",
            xlim=(0, 1.25 * max(group.roof, *rates)),
        )
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Forward and backward, {profile.machine.device}")
    keys = [Patch(color=OWN_COLOUR, label="this project"), Patch(color=PEER_COLOUR, label="peers")]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.savefig(path, dpi=150)


def _colour(case: CaseReport, group: GroupReport) -> str:
    if case.name == group.roof_is:
        return ROOF_COLOUR
    return PEER_COLOUR if case.is_peer else OWN_COLOUR


def _short(value: float) -> str:
    """Format with three digits, and without an exponent for large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
