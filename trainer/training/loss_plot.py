"""``loss.png``: a run's losses, learning rate and throughput over its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distilspeed.trainer.objective.term import Term
from distilspeed.trainer.training.metrics import StepMetrics

if TYPE_CHECKING:  # importing matplotlib takes a second, and only the end of a run needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW_STEPS = 50  # up to this many, each step is drawn as a dot
# Inches. Margins are fixed, because matplotlib's layout engines draw the figure several times to compute them.
AXES_WIDTH, AXES_HEIGHT = 3.5, 1.85
LEFT, RIGHT = 0.9, 0.25  # beside each panel's axes: room for a tick label like 1,234,567, and for half of one
ABOVE, BELOW = 0.35, 0.35  # above and below each panel's axes: room for titles, and for tick labels
HEADLINE, STEP_LABEL = 0.4, 0.3  # above and below all panels


@dataclass(frozen=True)
class _Panel:
    """A curve of ``loss.png``: a value of :class:`StepMetrics`, its title with unit, and its colour."""

    value: Callable[[StepMetrics], float]
    title: str
    in_short: Callable[[NDArray[np.float64]], str]
    colour: str  # Okabe & Ito 2008: distinguishable with every common colour blindness, and in grey
    is_loss: bool = True


def _first_and_last(curve: NDArray[np.float64]) -> str:
    return f"{curve[0]:.3g} → {curve[-1]:.3g}"


_SUM_PANEL = _Panel(lambda line: line.loss, "weighted sum of the losses", _first_and_last, "#000000")
_OTHER_PANELS = (
    _Panel(
        lambda line: line.lr,
        "learning rate",
        lambda curve: f"peak {curve.max():.3g}",
        "#555555",
        is_loss=False,
    ),
    _Panel(
        lambda line: line.tokens_per_s,
        "real tokens per second",
        lambda curve: f"median {np.median(curve):,.0f}",
        "#555555",
        is_loss=False,
    ),
)


def _panel_of(term: Term) -> _Panel:
    return _Panel(lambda line: line.losses[term.name], term.shown.panel, _first_and_last, term.shown.colour)


def plot_losses(metrics: Sequence[StepMetrics], path: Path, terms: Sequence[Term]) -> None:
    """Write :func:`loss_figure` as PNG, atomically."""
    import matplotlib

    beside = path.with_name(f".{path.name}.incomplete")
    with matplotlib.rc_context({"agg.path.chunksize": 10_000}):  # without it Agg fails on very long lines
        loss_figure(metrics, terms).savefig(beside, dpi=120, format="png")
    beside.replace(path)


def loss_figure(metrics: Sequence[StepMetrics], terms: Sequence[Term]) -> "Figure":
    """Draw the sum of the losses, the loss of each of ``terms``, learning rate and throughput, one panel each."""
    from matplotlib.figure import Figure

    panels = [_SUM_PANEL, *map(_panel_of, terms), *_OTHER_PANELS]
    columns = 2 if len(panels) <= 4 else 3
    rows = -(-len(panels) // columns)
    width = columns * (LEFT + AXES_WIDTH + RIGHT)
    height = HEADLINE + rows * (ABOVE + AXES_HEIGHT + BELOW) + STEP_LABEL
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - RIGHT / width,
        bottom=(STEP_LABEL + BELOW) / height,
        top=1 - (HEADLINE + ABOVE) / height,
        wspace=(LEFT + RIGHT) / AXES_WIDTH,
        hspace=(ABOVE + BELOW) / AXES_HEIGHT,
    )
    for place, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, place), panel, metrics)
    figure.suptitle(_headline(metrics), fontsize="large", y=1 - HEADLINE / height, va="bottom")
    figure.supxlabel("optimiser step", fontsize="medium", y=STEP_LABEL / height, va="top")
    return figure


def _headline(metrics: Sequence[StepMetrics]) -> str:
    last = metrics[-1]
    skipped = f", {last.skipped:,} batches skipped after fp16 overflows" if last.skipped else ""
    return f"{last.step:,} steps, {last.epoch:.2f} epochs, {last.tokens:,} real tokens{skipped}"


def _draw(axes: "Axes", panel: _Panel, metrics: Sequence[StepMetrics]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = np.array([line.step for line in metrics])
    values = np.array([panel.value(line) for line in metrics], dtype=np.float64)
    curve = smoothed(values) if panel.is_loss else values
    if curve is not values:
        axes.plot(steps, values, color=panel.colour, alpha=0.25, linewidth=0.7)
    marker = "." if len(steps) <= FEW_STEPS else None
    axes.plot(steps, curve, color=panel.colour, linewidth=1.8, marker=marker)
    axes.set_title(panel.title, loc="left", fontsize="medium")
    axes.set_title(panel.in_short(curve), loc="right", fontsize="small", color=panel.colour)
    axes.set_ylim(_limits(values) if panel.is_loss else (0, 1.1 * values.max() or 1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.7g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a moving average over 1 % of all values on either side; fewer than 100 values are not changed.

    Near the start, where a loss falls fast, the window has as few values after a point as before it.
    """
    reach = len(values) // 100
    if not reach:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    before = np.minimum(places, reach)
    after = np.minimum(before, places[::-1])
    return (sums[places + after + 1] - sums[places - before]) / (before + 1 + after)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the y limits of a loss: all values, but not the first 2 % if they would squeeze the rest."""
    low, high = values.min(), values.max()
    later = values[len(values) * 2 // 100 :]
    if high - low > 2 * (later.max() - low):
        high = later.max()
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
