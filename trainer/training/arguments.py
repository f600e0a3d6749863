"""The command line of ``launch/train.py``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distilspeed.trainer.data.masking import LARGEST_SMOOTHING, SMOOTHING
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.arguments import LARGEST_SEED, Settings, setting, whole_numbers


@dataclass(frozen=True, kw_only=True)
class StepArguments(Settings):
    """The arguments of the training step, for a training or a benchmark of it."""

    deepspeed_config: Path = setting(
        help='DeepSpeed config: a file or a shipped name, for example v100x8_fp16; "auto" values are filled in',
    )
    teacher: str = setting(help="hub id or folder of a language model")
    data_dir: Path = setting(help="corpus made by launch/prepare_data.py")
    train_batch_size: int | None = setting(
        None, above=0, help='rows per optimiser step over all GPUs, if the config says "auto"'
    )
    per_device_train_batch_size: int | None = setting(
        None, above=0, help='rows per micro-batch, if the config says "auto"'
    )
    dataloader_num_workers: int | None = setting(
        None, at_least=0, help="processes per rank that mask and collate; default 2 on a GPU, 0 on a CPU"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto",
        help="torch.compile the layers of student and teacher; auto does on GPUs, with exceptions (docs/method.md)",
    )


@dataclass(frozen=True, kw_only=True)
class TrainArguments(StepArguments):
    """The command line of ``launch/train.py`` without the losses: their flags are the fields of ``objective/``'s terms.

    The DeepSpeed config holds batch, optimiser, schedule and precision.
    """

    teacher: str = setting(help="hub id or folder of a language model; none: pre-training without a teacher")
    output_dir: Path = setting(help="folder for student/, checkpoints/, metrics.jsonl, loss.png")
    student: str | None = setting(
        None,
        help="hub id or folder of a student to start from; with --teacher none: of a model to train further",
    )
    student_config: str | None = setting(
        None, help="config file, folder or hub id of a student to start with random weights"
    )
    student_layers: tuple[int, ...] | None = setting(
        None, parse=whole_numbers, help="teacher layers to start from, for example 0,2,4,7,9,11"
    )
    teacher_zero3: bool = setting(False, help="shard the teacher's weights over the GPUs (ZeRO-3)")
    apex_layer_norm: bool = setting(False, help="NVIDIA apex's FusedLayerNorm in student and teacher (GPU)")
    max_steps: int | None = setting(None, above=0, one_of="lengths", help="optimiser steps")
    num_train_epochs: float = setting(3.0, above=0, one_of="lengths", help="passes over the corpus")
    learning_rate: float | None = setting(
        None, above=0, help='peak learning rate, if the config says "auto"; default 5e-4'
    )
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED, help="seed of row order, masking and dropout")
    mlm_smoothing: float = setting(
        SMOOTHING,
        at_least=0,
        at_most=LARGEST_SMOOTHING,
        metavar="SMOOTHING",
        help="tokens are masked with probability proportional to count^-SMOOTHING, so rare ones more often; "
        "0: all alike, as in BERT (default 0.7)",
    )
    save_steps: int = setting(500, above=0, help="steps between checkpoints")
    save_total_limit: int = setting(2, above=0, help="number of newest checkpoints to keep")
    save_retain_steps: int | None = setting(
        None, above=0, metavar="N", help="also keep the checkpoint of every N-th step; default none"
    )
    logging_steps: int = setting(10, above=0, help="steps between writes of the metrics")
    ddp_timeout: float = setting(
        1800.0,
        at_least=10,
        at_most=10_000_000,
        help="seconds after which an unresponsive rank ends the job",
    )
    full_determinism: bool = setting(False, help="bitwise reproducible runs on a GPU, too; slower")
    push_to_hub: str | None = setting(
        None, metavar="REPO", help="upload the finished student to this repository on the Hugging Face hub"
    )
    resume: bool = setting(False, help="resume from the newest checkpoint in --output_dir, if there is one")
    plan: bool = setting(False, help="print batch equation, memory estimate and FLOPs, then exit")
    gpu_memory: float | None = setting(
        None,
        above=0,
        metavar="GIB",
        help="with --plan: memory of the target GPU; default: memory of the local GPU, if there is one",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu_memory is not None and not self.plan:
            raise UserError("missing-argument", "--gpu_memory is used only by --plan; add --plan, or omit it")
        if not self.has_teacher:
            self._check_without_teacher()
        starts = ("student", "student_config", "student_layers")
        given = [f"--{name}" for name in starts if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(
                "conflicting-arguments",
                f"{given[0]} and {given[1]} are two starts of the student; omit one of them",
            )

    def _check_without_teacher(self) -> None:
        if self.student is None and self.student_config is None:
            raise UserError(
                "missing-argument",
                "--teacher none trains a model from a config, or another model further; give --student_config "
                "FILE_OR_DIR or --student ID_OR_DIR",
            )
        if self.student_layers is not None:
            raise UserError(
                "conflicting-arguments",
                "--student_layers selects layers of a teacher, and there is none with --teacher none; omit it",
            )
        if self.teacher_zero3:
            raise UserError(
                "conflicting-arguments",
                "--teacher_zero3 shards a teacher's weights, and there is none with --teacher none; omit it",
            )

    @property
    def has_teacher(self) -> bool:
        return self.teacher != "none"
