"""The command line of ``launch/ablation.py``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distilspeed.trainer.evaluation.tasks.names import expand_glue
from distilspeed.trainer.job.arguments import Settings, setting, whole_numbers


@dataclass(frozen=True, kw_only=True)
class AblationArguments(Settings):
    """The arguments of ``launch/ablation.py``."""

    teacher: str = setting(metavar="ID_OR_DIR", help="language model with safetensors weights")
    data_dir: Path = setting(metavar="DIR", help="corpus prepared by launch/prepare_data.py")
    output_dir: Path = setting(
        metavar="DIR", help="one folder per variant and seed; another call continues it"
    )
    deepspeed_config: Path = setting(help="DeepSpeed config: a file or a shipped name, for example cpu")
    max_steps: int = setting(above=0, help="optimiser steps of every training")
    seeds: int = setting(3, at_least=1, metavar="N", help="trainings and evaluations of each variant")
    student_layers: tuple[int, ...] | None = setting(
        None, parse=whole_numbers, help="teacher layers to start from (default: half of them)"
    )
    train_batch_size: int | None = setting(None, above=0, help='rows per step, if the config says "auto"')
    per_device_train_batch_size: int | None = setting(
        None, above=0, help='rows per micro-batch, if the config says "auto"'
    )
    learning_rate: float | None = setting(None, above=0, help='peak learning rate, if the config says "auto"')
    num_gpus: int | None = setting(
        None, at_least=1, help="GPUs of this host, or ranks on a CPU (default: all; 1)"
    )
    variants: str | None = setting(
        None, metavar="NAME,…", help="names of variants besides the full loss (default: all)"
    )
    task: tuple[str, ...] = setting(
        (), action="append", metavar="NAME_OR_DIR", help="as for launch/evaluate.py; repeat for more tasks"
    )
    glue_dir: Path | None = setting(
        None, metavar="DIR", help="folder of GLUE's own files (CoLA/train.tsv, …), to read instead of the hub"
    )
    max_rows: int = setting(1000, at_least=1, metavar="N", help="number of held-out rows to evaluate on")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", help="for the evaluation; auto uses the GPU if there is one"
    )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the tasks, with "glue" replaced by its nine tasks."""
        return tuple(expand_glue(self.task, self.glue_dir))
