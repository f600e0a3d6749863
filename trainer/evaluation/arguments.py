"""The command line of ``launch/evaluate.py``, and what ``launch/ablation.py`` shares with it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.names import expand_glue
from distilspeed.trainer.job.arguments import LARGEST_SEED, Settings, numbers, setting


@dataclass(frozen=True, kw_only=True)
class ComparisonArguments(Settings):
    """The arguments that ``launch/evaluate.py`` and ``launch/ablation.py`` share. Models have safetensors weights."""

    teacher: str = setting(metavar="ID_OR_DIR", help="language model with safetensors weights")
    data_dir: Path = setting(metavar="DIR", help="corpus prepared by launch/prepare_data.py")
    output_dir: Path = setting(metavar="DIR", help="created by this command")
    task: tuple[str, ...] = setting(
        (),
        action="append",
        metavar="NAME_OR_DIR",
        help="glue (all nine tasks), glue/mrpc, …, squad, squad_v2, or a folder: train.jsonl and dev.jsonl, train.txt "
        "and dev.txt (CoNLL), or the own files of GLUE or SQuAD; repeat for more tasks",
    )
    glue_dir: Path | None = setting(
        None, metavar="DIR", help="folder of GLUE's own files (CoLA/train.tsv, …), to read instead of the hub"
    )
    task_epochs: int | None = setting(
        None,
        at_least=1,
        metavar="N",
        help="epochs over a task's training examples (default: set by the task, usually 3)",
    )
    task_learning_rates: tuple[float, ...] | None = setting(
        None,
        parse=numbers,
        above=0,
        below=1,
        metavar="RATE,…",
        help="peak learning rate; of several, each model uses the best on dev (default: set by the task, 2e-5 or 5e-5)",
    )
    task_batch_size: int | None = setting(
        None, at_least=1, metavar="N", help="examples per step (default: set by the task, usually 32)"
    )
    task_precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", help="bf16 and fp16 (GPU) fine-tune with autocast; weights and scores stay float32"
    )
    max_rows: int = setting(1000, at_least=1, metavar="N", help="number of held-out rows to evaluate on")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", help="for the evaluation; auto uses the GPU if there is one"
    )
    num_gpus: int | None = setting(
        None,
        at_least=1,
        metavar="N",
        help="fine-tuning runs at a time, each on its own GPU (default: all of this host); on a CPU they share the "
        "cores (default: 1)",
    )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, with "glue" replaced by its nine tasks."""
        return tuple(expand_glue(self.task, self.glue_dir))


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(ComparisonArguments):
    """The arguments of ``launch/evaluate.py``. Models are folders or hub ids with safetensors weights."""

    student: str = setting(metavar="ID_OR_DIR", help="language model distilled from the teacher")
    baseline: tuple[str, ...] = setting(
        (),
        action="append",
        metavar="[NAME=]ID_OR_DIR",
        help="a model to compare with, for example the student's architecture trained without a teacher; repeat for "
        "more, each with its NAME",
    )
    fill_mask: tuple[str, ...] = setting(
        (),
        action="append",
        metavar="TEXT",
        help="a text with the tokenizer's mask once, such as 'Paris is the [MASK] of France.': the report shows every "
        "model's most probable tokens; repeat for more",
    )
    task_seeds: int = setting(
        3, at_least=1, metavar="N", help="number of fine-tuning runs per model and task"
    )
    seed: int = setting(
        0, at_least=0, at_most=LARGEST_SEED, help="seed of the masks, and first seed of the tasks"
    )
    resume: bool = setting(
        False, help="resume a killed evaluation, if there is one: its measurements are not repeated"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        roles = ["teacher", "student", *(role for role, _ in map(_named_baseline, self.baseline))]
        if len(set(roles)) < len(roles):
            raise UserError(
                "conflicting-arguments",
                f"two models are called {max(roles, key=roles.count)}; give every --baseline its own NAME=ID_OR_DIR",
            )

    @property
    def models(self) -> dict[str, str]:
        """The names of the models by role, the teacher first."""
        return {"teacher": self.teacher, "student": self.student} | dict(map(_named_baseline, self.baseline))


def _named_baseline(text: str) -> tuple[str, str]:
    """Return the role and the model of "NAME=MODEL"; without a name the role is "baseline"."""
    name, equals, model = text.partition("=")
    if equals and name and model and "/" not in name:
        return name, os.path.expanduser(model)  # noqa: PTH111
    return "baseline", text
