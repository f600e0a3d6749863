"""The files of an evaluation: report.json, report.md and report.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distilspeed.trainer.evaluation.latency import headline_latencies
from distilspeed.trainer.evaluation.report import ModelReport, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEACHER_COLOUR = "black"
# Okabe & Ito 2008: distinct with every common colour blindness, and in grey.
STUDENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HEIGHT_OF_POINTS = 4.0  # inches


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.png to an existing folder."""
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    draw_report(report, folder / "report.png")


def draw_report(report: Report, path: Path) -> None:
    """Draw a PNG: cost and quality in % of the teacher as bars, and accuracy against latency as points."""
    from matplotlib.figure import Figure

    teacher, *others = report.models
    costs = {"parameters": [model.parameters_percent for model in others]}
    worth = {teacher.quality.accuracy_name: [model.retention_percent or 0.0 for model in others]}
    for latencies in zip(*(headline_latencies(model.latencies) for model in others), strict=True):
        costs[f"{latencies[0].device} latency"] = [100 / latency.speed_up for latency in latencies]
    for index, score in enumerate(teacher.tasks):
        worth[score.task] = [model.tasks[index].retention_percent or 0.0 for model in others]

    places = max(len(costs), len(worth))
    heights = (1.6 + 0.55 * places, HEIGHT_OF_POINTS)
    figure = Figure(figsize=(10, sum(heights) + 0.25 * len(report.models)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = above.subplots(1, 2)
    _draw_bars(panels[0], "cost: lower is better", costs, places, report.models)
    _draw_bars(panels[1], "quality: higher is better", worth, places, report.models)
    devices = headline_latencies(teacher.latencies)
    for index, axes in enumerate(below.subplots(1, len(devices), squeeze=False)[0]):
        _draw_points(axes, index, report.models)
    handles, labels = panels[0].get_legend_handles_labels()
    # One below the other: they are long.
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=150)


def _draw_bars(
    axes: "Axes",
    title: str,
    groups: Mapping[str, Sequence[float]],
    places: int,
    models: Sequence[ModelReport],
) -> None:
    """Draw a group of bars for each measure: one bar per model but the teacher, in % of the teacher."""
    teacher, *others = models
    height = 0.7 / len(others)
    for index, model in enumerate(others):
        bars = axes.barh(
            np.arange(len(groups)) + (index - (len(others) - 1) / 2) * height,
            [values[index] for values in groups.values()],
            height=0.9 * height,
            color=_colour(index + 1),
            label=model.title,
        )
        # White background: the teacher's line crosses the label of a value just under 100.
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.bar_label(bars, fmt="%.0f %%", padding=4, bbox=background, zorder=3)
    axes.axvline(100, color=TEACHER_COLOUR, linewidth=1, linestyle="--", label=teacher.title)
    axes.set_yticks(np.arange(len(groups)), labels=list(groups))
    # Top to bottom, with the same number of places in both panels, so all bars have the same thickness.
    axes.set_ylim(places - 0.5, -0.5)
    axes.set(title=title, xlabel="% of the teacher", xlim=(0, 1.15 * max(axes.get_xlim()[1], 100)))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_points(axes: "Axes", device: int, models: Sequence[ModelReport]) -> None:
    """Draw accuracy against latency on one device: a labelled point per model."""
    latencies = [headline_latencies(model.latencies)[device] for model in models]
    accuracies = [100 * model.quality.accuracy for model in models]
    slowest, best, worst = max(latency.median_ms for latency in latencies), max(accuracies), min(accuracies)
    margin = max(0.25 * (best - worst), 0.02 * best, 0.1)
    axes.set(
        title="top left is best",
        xlabel=f"{latencies[0].device} latency in ms, {latencies[0].batch_size} × {latencies[0].length} tokens",
        ylabel=f"{models[0].quality.accuracy_name} in %",
        xlim=(0, 1.3 * slowest),
        ylim=(max(0.0, worst - margin), best + margin),
    )
    room_x, room_y = 0.3 * slowest, 0.07 * (best - worst + 2 * margin)  # of a label
    labels: list[tuple[float, float]] = []
    for index in np.argsort(accuracies, kind="stable"):
        x, y = latencies[index].median_ms, accuracies[index]
        axes.plot(x, y, "o", markersize=9, color=_colour(index))
        # A label moves up until it covers none of those below.
        below = [there + room_y for at, there in labels if abs(x - at) < room_x and abs(y - there) < room_y]
        labels.append((x, max([y, *below])))
        axes.annotate(f"  {models[index].role}", (x, y), labels[-1], va="center")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(index: int) -> str:
    """Return the colour of a model by its place, the teacher first."""
    return STUDENT_COLOURS[(index - 1) % len(STUDENT_COLOURS)] if index else TEACHER_COLOUR
