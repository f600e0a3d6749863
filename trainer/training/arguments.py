"""The command line of ``launch/train.py``."""

import math
from dataclasses import dataclass
from pathlib import Path

from distilspeed.trainer.errors import UserError, UserErrorCode


@dataclass(frozen=True)
class TrainArguments:
    """The command line of ``launch/train.py`` without the losses, whose flags are the fields of ``objective/``'s terms.

    The DeepSpeed config holds batch, optimiser, schedule and precision.
    """

    deepspeed_config: Path
    teacher: str
    data_dir: Path
    output_dir: Path
    student_config: str | None = None
    student_layers: tuple[int, ...] | None = None
    teacher_zero3: bool = False
    apex_layer_norm: bool = False
    max_steps: int | None = None
    num_train_epochs: float = 3.0
    train_batch_size: int | None = None
    per_device_train_batch_size: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    save_steps: int = 500
    save_total_limit: int = 2
    save_retain_steps: int | None = None
    logging_steps: int = 10
    dataloader_num_workers: int | None = None
    ddp_timeout: float = 1800.0
    compile: bool = False
    full_determinism: bool = False
    resume: bool = False
    plan: bool = False
    gpu_memory: float | None = None

    def __post_init__(self) -> None:
        has_teacher = self.teacher != "none"
        for name in (
            "num_train_epochs",
            "learning_rate",
            "ddp_timeout",
            "gpu_memory",
        ):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise UserError("bad-argument", f"--{name} is {getattr(self, name)}; give a finite number")
        checks = [
            (self.max_steps is None or self.max_steps > 0, "--max_steps must be above 0"),
            (self.num_train_epochs > 0, "--num_train_epochs must be above 0"),
            (0 <= self.seed < 1 << 32, "--seed must be from 0 to 2^32 - 1"),
            (self.save_steps > 0, "--save_steps must be above 0"),
            (self.save_total_limit > 0, "--save_total_limit must be above 0"),
            (
                self.save_retain_steps is None or self.save_retain_steps > 0,
                "--save_retain_steps must be above 0",
            ),
            (self.logging_steps > 0, "--logging_steps must be above 0"),
            (10 <= self.ddp_timeout <= 1e7, "--ddp_timeout must be from 10 to 1e7 seconds"),
            ((self.dataloader_num_workers or 0) >= 0, "--dataloader_num_workers must not be negative"),
            (self.gpu_memory is None or self.gpu_memory > 0, "--gpu_memory must be above 0"),
            (self.learning_rate is None or self.learning_rate > 0, "--learning_rate must be above 0"),
            (
                self.train_batch_size is None or self.train_batch_size > 0,
                "--train_batch_size must be above 0",
            ),
            (
                self.per_device_train_batch_size is None or self.per_device_train_batch_size > 0,
                "--per_device_train_batch_size must be above 0",
            ),
        ]
        missing = [
            (
                self.gpu_memory is None or self.plan,
                "--gpu_memory says what card a plan is for; give --plan, too",
            ),
            (
                has_teacher or self.student_config is not None,
                "--teacher none trains from a config; name it with --student_config FILE_OR_DIR",
            ),
        ]
        conflicts = [
            (
                not has_teacher or self.student_config is None,
                "--student_config goes with --teacher none; a distilled student's config follows from its teacher",
            ),
            (
                has_teacher or self.student_layers is None,
                "--student_layers picks layers of a teacher; it has no meaning with --teacher none",
            ),
            (
                has_teacher or not self.teacher_zero3,
                "--teacher_zero3 shares out a teacher's weights; it has no meaning with --teacher none",
            ),
        ]
        groups: list[tuple[UserErrorCode, list[tuple[bool, str]]]] = [
            ("bad-argument", checks),
            ("missing-argument", missing),
            ("conflicting-arguments", conflicts),
        ]
        for code, group in groups:
            for holds, message in group:
                if not holds:
                    raise UserError(code, message)

    @property
    def has_teacher(self) -> bool:
        return self.teacher != "none"
