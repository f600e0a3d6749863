"""The command line of ``launch/finetune.py``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.tasks.names import expand_glue
from distilspeed.trainer.job.arguments import LARGEST_SEED, Settings, setting


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments(Settings):
    """The arguments of ``launch/finetune.py``. Models are folders or hub ids with safetensors weights."""

    model: str = setting(metavar="ID_OR_DIR", help="pre-trained model; it gets a new head for the task")
    task: str = setting(
        metavar="NAME_OR_DIR",
        help="glue/mrpc, …, squad, squad_v2, or a folder: train.jsonl and dev.jsonl, train.txt and dev.txt (CoNLL), or "
        "the own files of GLUE or SQuAD",
    )
    output_dir: Path = setting(
        metavar="DIR", help="created by this command: model, tokenizer and results.json"
    )
    glue_dir: Path | None = setting(
        None, metavar="DIR", help="folder of GLUE's own files (CoLA/train.tsv, …), to read instead of the hub"
    )
    teacher: str | None = setting(
        None, metavar="ID_OR_DIR", help="model that is fine-tuned on the task, to learn from its outputs, too"
    )
    temperature: float = setting(2.0, above=0, help="with --teacher: temperature of its outputs")
    alpha_ce: float = setting(0.5, at_least=0, help="with --teacher: weight of the loss to its outputs")
    alpha_task: float = setting(0.5, at_least=0, help="with --teacher: weight of the task's own loss")
    num_train_epochs: int | None = setting(
        None, at_least=1, help="passes over the training examples (default: set by the task, usually 3)"
    )
    learning_rate: float | None = setting(
        None, above=0, below=1, help="peak learning rate (default: set by the task, 2e-5 or 5e-5)"
    )
    per_device_train_batch_size: int | None = setting(
        None, at_least=1, help="examples per step (default: set by the task, usually 32)"
    )
    max_seq_length: int | None = setting(
        None, at_least=8, help="longest input in tokens (default: set by the task, usually 128)"
    )
    bf16: bool = setting(False, help="bf16 by autocast; weights stay float32")
    fp16: bool = setting(False, help="fp16 by autocast with loss scaling (GPU); weights stay float32")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", help="auto uses the GPU if there is one")
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED, help="seed of the new head, order and dropout")
    save_steps: int = setting(500, above=0, help="steps between checkpoints")
    resume: bool = setting(False, help="resume from the checkpoint in --output_dir, if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task == "glue":
            raise UserError("bad-argument", "--task glue is nine tasks; choose one, for example glue/mrpc")
        if self.bf16 and self.fp16:
            raise UserError("conflicting-arguments", "--bf16 and --fp16 exclude each other; give one of them")
        if self.teacher is not None and not self.alpha_ce + self.alpha_task:
            raise UserError("bad-argument", "no loss has a weight; set --alpha_ce or --alpha_task above 0")

    @property
    def task_name(self) -> str:
        """The name of the task, or its folder in ``glue_dir``."""
        (name,) = expand_glue([self.task], self.glue_dir)
        return name

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"
