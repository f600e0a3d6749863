"""The results of an evaluation, written as report.json, report.md and report.png."""

import datetime
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from distilspeed.kernels.profiling.machine import cpu_name
from distilspeed.trainer.evaluation.tasks.names import GLUE_FOLDERS, GLUE_PREFIX
from distilspeed.trainer.evaluation.tasks.task import Scores, TaskConditions
from distilspeed.trainer.evaluation.token_quality import TokenQuality

# Okabe & Ito 2008: distinct with every common colour blindness, and in grey.
STUDENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def percent_of(value: float, teacher: float) -> float | None:
    """Return ``value`` in % of the teacher's value, or None if that is not above 0."""
    return 100 * value / teacher if teacher > 0 else None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass at batch size 1; ``speed_up``: the teacher's median over this median."""

    device: str
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    repetitions: int
    speed_up: float

    @classmethod
    def of(cls, device: str, times: NDArray[np.float64], teacher_times: NDArray[np.float64]) -> "Latency":
        first, median, third = np.percentile(times, [25, 50, 75]).tolist()
        return cls(device, median, first, third, len(times), float(np.median(teacher_times)) / median)


@dataclass(frozen=True)
class TaskScore:
    """Scores on a task's dev examples: every metric for every seed, and statistics of the first metric.

    ``standard_deviation`` is that of the sample, None for one seed. ``retention_deviation`` is that of the retention:
    it contains the deviations of this model and of the teacher; None for the teacher itself.
    """

    task: str
    scores: Mapping[str, tuple[float, ...]]
    mean: float
    standard_deviation: float | None
    retention_percent: float | None
    retention_deviation: float | None
    learning_rate: float

    @classmethod
    def of(
        cls, task: str, scores: Sequence[Scores], teacher_scores: Sequence[Scores], learning_rate: float
    ) -> "TaskScore":
        """Summarise this model's and the teacher's scores, one per seed, with metrics in the task's order."""
        of_metrics = {metric: tuple(seed[metric] for seed in scores) for metric in scores[0]}
        first = next(iter(of_metrics))
        mean, deviation = mean_and_deviation(of_metrics[first])
        teacher_mean, teacher_deviation = mean_and_deviation([seed[first] for seed in teacher_scores])
        retention = percent_of(mean, teacher_mean)
        retention_deviation = None
        is_teacher = scores is teacher_scores
        if (
            retention is not None
            and deviation is not None
            and teacher_deviation is not None
            and not is_teacher
        ):
            # Of a quotient, to first order.
            retention_deviation = math.hypot(100 * deviation, retention * teacher_deviation) / teacher_mean
        return cls(task, of_metrics, mean, deviation, retention, retention_deviation, learning_rate)

    @property
    def mean_of_metrics(self) -> float:
        """The mean over seeds and metrics, which is the task's part of the GLUE score."""
        return statistics.fmean(value for of_seeds in self.scores.values() for value in of_seeds)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean, and the standard deviation of the sample (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class ModelReport:
    """The results of one model; relative values are relative to the teacher.

    ``role`` is teacher, student, baseline, or a baseline's own name. ``name`` is a hub id or the end of a path;
    distinct models have distinct names. ``retention_percent`` compares accuracies.
    """

    role: str
    name: str
    parameters: int
    parameters_percent: float
    weights_bytes: int
    quality: TokenQuality
    retention_percent: float | None
    teacher_agreement: float
    latencies: tuple[Latency, ...]
    tasks: tuple[TaskScore, ...]

    @property
    def title(self) -> str:
        return f"{self.role} ({self.name})"

    def to_json(self) -> dict[str, Any]:
        """Return the results as an object; "mlm_retention_percent" or "clm_retention_percent" names the objective."""
        names = {"retention_percent": f"{self.quality.short.lower()}_retention_percent"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class EvaluationConditions:
    """The data and settings of the measurements."""

    corpus: str
    held_out_rows: int
    seq_length: int
    seed: int
    tasks: tuple[TaskConditions, ...]
    task_seeds: int
    task_learning_rates: tuple[float, ...] | None  # the rates that were tried; None for the task's own


@dataclass(frozen=True)
class Environment:
    """The machine and the versions of the measurements; ``threads``: PyTorch's threads on the CPU."""

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    torch_version: str
    transformers_version: str
    date: str

    @classmethod
    def here(cls, device: torch.device) -> "Environment":
        return cls(
            cpu=cpu_name(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )


@dataclass(frozen=True)
class Report:
    """The report: teacher first, then student, then the baselines."""

    models: tuple[ModelReport, ...]
    conditions: EvaluationConditions
    machine: Environment

    def to_json(self) -> str:
        content = asdict(self) | {"models": [model.to_json() for model in self.models]}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Return a Markdown table with one row per model."""
        teacher = self.models[0]
        headings = ["", "parameters", "weights", *teacher.quality.columns, "retention"]
        headings += ["same token as teacher"]
        headings += [f"{latency.device} latency (speed-up)" for latency in teacher.latencies]
        headings += [f"{score.task} {' / '.join(score.scores)} (retention)" for score in teacher.tasks]
        headings += list(glue_scores(teacher.tasks))
        rows = [headings, ["---", *["---:"] * (len(headings) - 1)], *map(_cells, self.models)]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def to_markdown(self) -> str:
        lines = "\n".join(f"- {line}" for line in self._condition_lines())
        return f"# Student and teacher\n\n{self.table()}\n\n![report](report.png)\n\n{lines}\n"

    def _learning_rate(self, task: TaskConditions) -> str:
        tried = self.conditions.task_learning_rates or (task.fine_tuning.learning_rate,)
        if len(tried) == 1:
            return f"{tried[0]:g}"
        best = ", ".join(
            f"{model.role} {score.learning_rate:g}"
            for model in self.models
            for score in model.tasks
            if score.task == task.name
        )
        return f"the best on dev of {', '.join(f'{rate:g}' for rate in tried)} ({best})"

    def _condition_lines(self) -> list[str]:
        conditions, machine, teacher = self.conditions, self.machine, self.models[0]
        lines = [
            f"Held-out rows: {conditions.held_out_rows} of the corpus {conditions.corpus}, "
            f"{conditions.seq_length} tokens each; {teacher.quality.conditions(conditions.seed)}",
            "Retention: accuracy, or a task's first metric, in % of the teacher's. Parameters: with the "
            f"{teacher.quality.head}; a shared parameter counts once. Weights: size of the files, in their stored "
            "precision.",
            f"Latency: forward pass of the encoder without a head, batch 1, {conditions.seq_length} tokens, "
            f"float32, models in turns; median [quartiles] of {teacher.latencies[0].repetitions} runs on the CPU, "
            f"PyTorch threads: {machine.threads}. Speed-up: the teacher's median over the model's.",
        ]
        if conditions.tasks:
            lines.append(
                f"Tasks: scores on dev in %, mean ± standard deviation over {conditions.task_seeds} seeds, after "
                "fine-tuning with AdamW."
            )
        lines += [
            f"{task.name}: {' and '.join(task.metrics)}; {task.fine_tuning.epochs} epochs, learning rate "
            f"{self._learning_rate(task)}, batch {task.fine_tuning.batch_size}, at most "
            f"{task.fine_tuning.max_length} tokens; {task.described()}."
            for task in conditions.tasks
        ]
        gpu = f"; {machine.gpu}" if machine.gpu else ""
        lines.append(
            f"Machine: {machine.cpu}, {machine.cores} cores{gpu}; torch {machine.torch_version}, "
            f"transformers {machine.transformers_version}; {machine.date}."
        )
        return lines


def glue_scores(tasks: Sequence[TaskScore]) -> dict[str, float]:
    """Return the GLUE score by its heading: the mean over all tasks of GLUE of the mean of a task's metrics.

    The literature counts it with and without WNLI, on which most models learn nothing. Without all the tasks there is
    no score.
    """
    means = {score.task: score.mean_of_metrics for score in tasks if score.task.startswith(GLUE_PREFIX)}
    wnli = means.pop(f"{GLUE_PREFIX}wnli", None)
    if len(means) < len(GLUE_FOLDERS) - 1:
        return {}
    scores = {"GLUE without WNLI": statistics.fmean(means.values())}
    return scores if wnli is None else scores | {"GLUE": statistics.fmean([*means.values(), wnli])}


def _cells(model: ModelReport) -> list[str]:
    return [
        model.title.replace("|", "\\|"),
        f"{model.parameters / 1e6:,.2f} M",
        f"{model.weights_bytes / 1e6:,.1f} MB",
        *model.quality.cells(),
        _percent(model.retention_percent),
        _percent(100 * model.teacher_agreement),
        *(
            f"{latency.median_ms:.1f} [{latency.first_quartile_ms:.1f}, {latency.third_quartile_ms:.1f}] ms "
            f"({latency.speed_up:.2f}×)"
            for latency in model.latencies
        ),
        *(
            f"{' / '.join(map(shown_score, score.scores.values()))} "
            f"({_percent(score.retention_percent, score.retention_deviation)})"
            for score in model.tasks
        ),
        *(f"{100 * score:.1f}" for score in glue_scores(model.tasks).values()),
    ]


def _percent(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} %" if deviation is None else f"{value:.1f} ± {deviation:.1f} %"


def shown_score(of_seeds: Sequence[float]) -> str:
    """Show a score in %: the mean over seeds, and the standard deviation if there are several."""
    mean, deviation = mean_and_deviation(of_seeds)
    return f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.png to an existing folder."""
    (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
    draw_report(report, folder / "report.png")


def draw_report(report: Report, path: Path) -> None:
    """Draw cost and quality of student and baselines in % of the teacher, as a PNG."""
    from matplotlib.figure import Figure

    teacher, *others = report.models
    costs = {"parameters": [model.parameters_percent for model in others]}
    for index, latency in enumerate(teacher.latencies):
        costs[f"{latency.device} latency"] = [100 / model.latencies[index].speed_up for model in others]
    worth = {teacher.quality.accuracy_name: [model.retention_percent or 0.0 for model in others]}
    for index, score in enumerate(teacher.tasks):
        worth[score.task] = [model.tasks[index].retention_percent or 0.0 for model in others]

    figure = Figure(figsize=(10, 2.8 + 0.55 * max(len(costs), len(worth))), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("cost: lower is better", "quality: higher is better")
    for axes, title, groups in zip(panels, titles, (costs, worth), strict=True):
        places = np.arange(len(groups))
        height = 0.7 / len(others)
        for index, model in enumerate(others):
            bars = axes.barh(
                places + (index - (len(others) - 1) / 2) * height,
                [values[index] for values in groups.values()],
                height=0.9 * height,
                color=STUDENT_COLOURS[index % len(STUDENT_COLOURS)],
                label=model.title,
            )
            # White background: the teacher's line crosses the label of a value just under 100.
            background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.bar_label(bars, fmt="%.0f %%", padding=4, bbox=background, zorder=3)
        axes.axvline(100, color="black", linewidth=1, linestyle="--", label=teacher.title)
        axes.set_yticks(places, labels=list(groups))
        # Top to bottom, with the same number of places in both panels, so all bars have the same thickness.
        axes.set_ylim(max(len(costs), len(worth)) - 0.5, -0.5)
        axes.set(title=title, xlabel="% of the teacher", xlim=(0, 1.15 * max(axes.get_xlim()[1], 100)))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", frameon=False
    )  # one below the other: they are long
    figure.savefig(path, dpi=150)
