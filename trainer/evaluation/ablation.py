"""The ablation of Sanh et al. 2019, Table 4: what each loss, the teacher and its weights are worth.

Every variant differs from the full loss in one thing. Its students are trained with several seeds and evaluated on
held-out rows and tasks; differences to the full loss are between runs with the same seed.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.evaluation.report import Environment, mean_and_deviation, percent_of, shown_score
from distilspeed.trainer.evaluation.tasks.task import TaskConditions
from distilspeed.trainer.objective.registry import TERMS

# The column of a report beside the tasks: accuracy on masked or next tokens of held-out rows.
ACCURACY = "held-out accuracy"
TASK_MEAN = "task mean"


@dataclass(frozen=True)
class Variant:
    """A way to make the student.

    Attributes:
        name: of its folder.
        title: of its row in the table.
        flags: for launch/train.py.
        has_teacher: whether it is distilled; without a teacher it is trained by language modelling alone.
        from_layers: whether it starts from the teacher's layers, or from random weights.
        is_trained: whether it is trained at all.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    has_teacher: bool = True
    from_layers: bool = True
    is_trained: bool = True


FULL = Variant("full", "all losses")


def variants(objective: TrainingObjective) -> list[Variant]:
    """Return all variants for a training objective, the full loss first."""
    return [
        FULL,
        *(
            Variant(
                f"without_{term.name}", f"without {term.shown.card.lower()}", (f"--alpha_{term.name}", "0")
            )
            for term in TERMS
            if not term().is_optional and term.objective in (None, objective)
        ),
        Variant("random_weights", "from random weights", from_layers=False),
        Variant("no_teacher", "no teacher, from random weights", has_teacher=False, from_layers=False),
        Variant("no_teacher_from_layers", "no teacher, from the teacher's layers", has_teacher=False),
        Variant("untrained", "the teacher's layers, untrained", is_trained=False),
    ]


# The scores of one model by column: held-out accuracy, and the first metric of each task; from 0 to 1.
Scores = Mapping[str, float]


@dataclass(frozen=True)
class VariantResult:
    """The scores of a variant, one for each seed, and of the full loss with the same seeds."""

    name: str
    title: str
    scores: tuple[Scores, ...]

    def differences(self, full: "VariantResult", column: str) -> list[float]:
        """Return the differences to the full loss, one per seed."""
        pairs = zip(self.scores, full.scores, strict=True)
        return [ours[column] - theirs[column] for ours, theirs in pairs]


@dataclass(frozen=True)
class AblationReport:
    """The scores of all variants and of the teacher, and how they came about."""

    teacher: tuple[Scores, ...]
    results: tuple[VariantResult, ...]
    max_steps: int
    tokens: int  # real tokens that each trained student has seen
    tasks: tuple[TaskConditions, ...]
    task_learning_rates: tuple[float, ...] | None  # the rates that were tried; None for the tasks' own
    task_precision: str
    seconds: float  # of all trainings and evaluations together; some may have run at the same time
    machine: Environment

    @property
    def columns(self) -> list[str]:
        """Held-out accuracy, the tasks, and their mean if there are several."""
        return list(self.teacher[0])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Return a Markdown table: the full loss's scores, and every other variant's differences to it."""
        full, *others = self.results
        rows = [["", *self.columns], ["---", *["---:"] * len(self.columns)]]
        rows.append(
            [
                "teacher",
                *(shown_score([scores[column] for scores in self.teacher]) for column in self.columns),
            ]
        )
        rows.append([full.title, *(self._full_cell(full, column) for column in self.columns)])
        rows += [
            [other.title, *(_difference(other.differences(full, column)) for column in self.columns)]
            for other in others
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def _full_cell(self, full: VariantResult, column: str) -> str:
        of_seeds = [scores[column] for scores in full.scores]
        retention = percent_of(
            statistics.fmean(of_seeds), statistics.fmean(each[column] for each in self.teacher)
        )
        return shown_score(of_seeds) + ("" if retention is None else f" ({retention:.1f} %)")

    def to_markdown(self) -> str:
        machine = self.machine
        tasks = "".join(f"\n- {task.line(self._learning_rate(task))}" for task in self.tasks)
        return (
            f"# Ablation\n\n{self.table()}\n\n![ablation](ablation.png)\n\n"
            "Scores in %, mean ± standard deviation over "
            f"{len(self.results[0].scores)} seeds; in brackets the share of the teacher's score. Below the full loss: "
            f"differences to it with the same seed. Each trained student has seen {self.tokens:,} tokens in "
            f"{self.max_steps:,} steps; all runs together took {self.seconds / 3600:.1f} hours on {machine.cpu}, "
            f"{machine.cores} cores{f', {machine.gpu}' if machine.gpu else ''}, torch {machine.torch_version}; "
            f"{machine.date}.\n"
            + (f"\nTasks, fine-tuned with AdamW in {self.task_precision}:\n{tasks}\n" if tasks else "")
        )

    def _learning_rate(self, task: TaskConditions) -> str:
        tried = self.task_learning_rates or (task.fine_tuning.learning_rate,)
        rates = ", ".join(f"{rate:g}" for rate in tried)
        return rates if len(tried) == 1 else f"the best on dev of {rates} for each model and seed"


def with_task_mean(scores: Mapping[str, float]) -> Scores:
    """Add the mean of the tasks, if there are several."""
    tasks = [value for column, value in scores.items() if column != ACCURACY]
    return {**scores, TASK_MEAN: statistics.fmean(tasks)} if len(tasks) > 1 else dict(scores)


def write_ablation(report: AblationReport, folder: Path) -> None:
    """Write ablation.json, ablation.md and ablation.png to an existing folder."""
    (folder / "ablation.json").write_text(report.to_json(), encoding="utf-8")
    (folder / "ablation.md").write_text(report.to_markdown(), encoding="utf-8")
    _draw(report, folder / "ablation.png")


def _draw(report: AblationReport, path: Path) -> None:
    """Draw every variant's differences to the full loss with their deviations, one panel per column."""
    from matplotlib.figure import Figure

    full, *others = report.results
    figure = Figure(figsize=(3.2 + 2.6 * len(report.columns), 1.2 + 0.45 * len(others)), layout="constrained")
    panels = figure.subplots(1, len(report.columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, report.columns, strict=True):
        for place, other in enumerate(others):
            mean, deviation = mean_and_deviation(other.differences(full, column))
            axes.errorbar(100 * mean, place, xerr=100 * (deviation or 0), fmt="o", capsize=3, color="#0072B2")
        axes.axvline(0, color="black", linewidth=1, linestyle="--")
        axes.set(title=column, xlabel="points")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(others)), labels=[other.title for other in others])
    panels[0].invert_yaxis()
    figure.suptitle("Difference to all losses")
    figure.savefig(path, dpi=150)


def _difference(of_seeds: Sequence[float]) -> str:
    """Show a difference in points, with its sign."""
    return f"{'+' * (statistics.fmean(of_seeds) >= 0)}{shown_score(of_seeds)}"
