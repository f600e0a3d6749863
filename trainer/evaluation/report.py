"""The results of an evaluation, as JSON and Markdown."""

import datetime
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from distilspeed.kernels.profiling.machine import cpu_name
from distilspeed.trainer.evaluation.fill_mask import Guess
from distilspeed.trainer.evaluation.latency import Latency, headline_latencies
from distilspeed.trainer.evaluation.tasks.names import GLUE_FOLDERS, GLUE_PREFIX
from distilspeed.trainer.evaluation.tasks.task import Scores, TaskConditions
from distilspeed.trainer.evaluation.token_quality import TokenQuality


def percent_of(value: float, teacher: float) -> float | None:
    """Return ``value`` in % of the teacher's value, or None if that is not above 0."""
    return 100 * (value / teacher) if teacher > 0 else None


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
    quality: TokenQuality
    retention_percent: float | None
    teacher_agreement: float
    latencies: tuple[Latency, ...]
    tasks: tuple[TaskScore, ...]
    guesses: tuple[tuple[Guess, ...], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.role} ({self.name})"

    def megabytes(self, bytes_per_parameter: int) -> float:
        """Return the size of the parameters in 10^6 bytes."""
        return self.parameters * bytes_per_parameter / 1e6

    def to_json(self) -> dict[str, Any]:
        """Return the results as an object; "mlm_retention_percent" or "clm_retention_percent" names the objective."""
        names = {"retention_percent": f"{self.quality.short.lower()}_retention_percent"}
        sizes = {"fp32_megabytes": self.megabytes(4), "fp16_megabytes": self.megabytes(2)}
        return {names.get(name, name): value for name, value in (asdict(self) | sizes).items()}


@dataclass(frozen=True)
class EvaluationConditions:
    """The data and settings of the measurements."""

    corpus: str
    held_out_rows: int
    seq_length: int
    seed: int
    fill_mask: tuple[str, ...]
    tasks: tuple[TaskConditions, ...]
    task_seeds: int
    task_learning_rates: tuple[float, ...] | None  # the rates that were tried; None for the task's own
    task_precision: str  # of fine-tuning: "fp32", "bf16" or "fp16"


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
        headings = ["", "parameters", "fp32 / fp16", *teacher.quality.columns, "retention"]
        headings += ["same token as teacher", *teacher.quality.further_columns]
        headings += [
            f"{latency.device} latency (speed-up)" for latency in headline_latencies(teacher.latencies)
        ]
        headings += [f"{score.task} {' / '.join(score.scores)} (retention)" for score in teacher.tasks]
        headings += list(glue_scores(teacher.tasks))
        return _markdown([headings, *map(_cells, self.models)])

    def latency_table(self) -> str:
        """Return a Markdown table with one row per device, batch size and length, and one column per model."""
        rows = [
            [
                f"{of_models[0].device}, {of_models[0].batch_size} × {of_models[0].length}",
                *map(_latency_cell, of_models),
            ]
            for of_models in zip(*(model.latencies for model in self.models), strict=True)
        ]
        return _markdown([["batch × tokens", *(_cell(model.role) for model in self.models)], *rows])

    def guesses_table(self) -> str:
        """Return a Markdown table with one row per text of --fill_mask, and one column per model."""
        rows = [
            [_code_cell(text), *(", ".join(map(_guess, of_text)) for of_text in of_models)]
            for text, of_models in zip(
                self.conditions.fill_mask,
                zip(*(model.guesses for model in self.models), strict=True),
                strict=True,
            )
        ]
        return _markdown([["", *(_cell(model.role) for model in self.models)], *rows])

    def to_markdown(self) -> str:
        lines = "\n".join(f"- {line}" for line in self._condition_lines())
        return (
            f"# Student and teacher\n\n{self.table()}\n\n![report](report.png)\n\n{lines}\n\n"
            f"## Latency (speed-up)\n\n{self.latency_table()}\n"
            + (f"\n## Most probable tokens\n\n{self.guesses_table()}\n" if self.conditions.fill_mask else "")
        )

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
        headline = headline_latencies(teacher.latencies)[0]
        lines = [
            f"Held-out rows: {conditions.held_out_rows} of the corpus {conditions.corpus}, "
            f"{conditions.seq_length} tokens each; {teacher.quality.conditions(conditions.seed)}",
            "Retention: accuracy, or a task's first metric, in % of the teacher's. Parameters: with the "
            f"{teacher.quality.head}; a shared parameter counts once. fp32 / fp16: parameters × 4 and × 2 bytes.",
            "Latency: forward pass of the model without its head, float32, on real tokens of held-out rows; PyTorch "
            f"threads on the CPU: {machine.threads}. Models in turns, median [quartiles]. The first table has "
            f"{headline.batch_size} × {headline.length} tokens (batch × length). Speed-up: the teacher's median over "
            "the model's.",
        ]
        if conditions.tasks:
            lines.append(
                f"Tasks: scores on dev in %, mean ± standard deviation over {conditions.task_seeds} seeds, after "
                f"fine-tuning with AdamW in {conditions.task_precision}."
            )
        lines += [task.line(self._learning_rate(task)) for task in conditions.tasks]
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


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row has the headings, the first column is aligned left."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _code_cell(text: str) -> str:
    """Return a text as code in a cell, so that ``<mask>`` is not taken for HTML, nor ``*`` for emphasis."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return _cell(f"{fence}{space}{text}{space}{fence}")


def _guess(guess: Guess) -> str:
    return f"{_code_cell(guess.token)} {100 * guess.probability:.0f} %"


def _cells(model: ModelReport) -> list[str]:
    return [
        _cell(model.title),
        f"{model.parameters / 1e6:,.2f} M",
        f"{model.megabytes(4):,.1f} / {model.megabytes(2):,.1f} MB",
        *model.quality.cells(),
        _percent(model.retention_percent),
        _percent(100 * model.teacher_agreement),
        *model.quality.further_cells(),
        *map(_latency_cell, headline_latencies(model.latencies)),
        *(
            f"{' / '.join(map(shown_score, score.scores.values()))} "
            f"({_percent(score.retention_percent, score.retention_deviation)})"
            for score in model.tasks
        ),
        *(f"{100 * score:.1f}" for score in glue_scores(model.tasks).values()),
    ]


def _latency_cell(latency: Latency) -> str:
    median, first, third = map(
        _milliseconds, (latency.median_ms, latency.first_quartile_ms, latency.third_quartile_ms)
    )
    return f"{median} [{first}, {third}] ms ({latency.speed_up:.2f}×)"


def _milliseconds(value: float) -> str:
    """Show three digits, or all digits before the decimal point."""
    decimals = max(0, 2 - int(math.log10(max(value, 1))))
    return f"{value:,.{decimals}f}"


def _percent(value: float | None, deviation: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} %" if deviation is None else f"{value:.1f} ± {deviation:.1f} %"


def shown_score(of_seeds: Sequence[float]) -> str:
    """Show a score in %: the mean over seeds, and the standard deviation if there are several."""
    mean, deviation = mean_and_deviation(of_seeds)
    return f"{100 * mean:.1f}" if deviation is None else f"{100 * mean:.1f} ± {100 * deviation:.1f}"
