"""The command line of ``launch/ablation.py``."""

from dataclasses import dataclass
from pathlib import Path

from distilspeed.trainer.data.masking import LARGEST_SMOOTHING
from distilspeed.trainer.evaluation.arguments import ComparisonArguments
from distilspeed.trainer.job.arguments import setting, whole_numbers


@dataclass(frozen=True, kw_only=True)
class AblationArguments(ComparisonArguments):
    """The arguments of ``launch/ablation.py``."""

    output_dir: Path = setting(
        metavar="DIR", help="one folder per variant and seed; another call continues it"
    )
    deepspeed_config: Path = setting(help="DeepSpeed config: a file or a shipped name, for example cpu")
    max_steps: int = setting(above=0, help="optimiser steps of every training")
    seeds: int = setting(3, at_least=1, metavar="N", help="trainings and evaluations of each variant")
    variants: str | None = setting(
        None, metavar="NAME,…", help="names of variants besides the full loss (default: all)"
    )
    student_layers: tuple[int, ...] | None = setting(
        None, parse=whole_numbers, help="teacher layers to start from (default: half of them)"
    )
    train_batch_size: int | None = setting(None, above=0, help='rows per step, if the config says "auto"')
    per_device_train_batch_size: int | None = setting(
        None, above=0, help='rows per micro-batch, if the config says "auto"'
    )
    learning_rate: float | None = setting(None, above=0, help='peak learning rate, if the config says "auto"')
    mlm_smoothing: float | None = setting(
        None,
        at_least=0,
        at_most=LARGEST_SMOOTHING,
        help="as for launch/train.py: 0 draws the masks of training uniformly",
    )
    num_gpus: int | None = setting(
        None,
        at_least=1,
        metavar="N",
        help="ranks of a training, and fine-tuning runs at a time, each on its own GPU (default: all of this host); on "
        "a CPU they share the cores (default: 1)",
    )
