"""Checkpoints of a run: DeepSpeed's own, with the trainer's place in the data; the last k are kept."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch.distributed

from distilspeed.trainer.errors import UserError


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimiser steps taken and real tokens seen, over all ranks."""

    step: int = 0
    tokens: int = 0


class Checkpoints:
    """The folder ``checkpoints/`` of a run. DeepSpeed's files are pickles: only a run's own are loaded."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def any(self) -> bool:
        return (self.folder / "latest").is_file()

    def save(self, engine: deepspeed.DeepSpeedEngine, progress: Progress) -> None:
        """Save parameters, optimiser, schedule, loss scale and progress; called by every rank."""
        engine.save_checkpoint(str(self.folder), tag=_tag(progress.step), client_state=asdict(progress))
        if torch.distributed.get_rank() == 0:
            for old in sorted(self.folder.glob(_tag_pattern()))[: -self.keep]:
                shutil.rmtree(old)

    def resume(self, engine: deepspeed.DeepSpeedEngine) -> Progress:
        """Load the newest checkpoint into the engine; called by every rank.

        Raises:
            UserError: it cannot be loaded.
        """
        try:
            path, state = engine.load_checkpoint(str(self.folder))
        except Exception as error:  # DeepSpeed raises whatever the damaged part raises
            raise UserError(f"the checkpoint in {self.folder} cannot be loaded: {error}") from error
        if path is None:
            raise UserError(f"{self.folder} holds no checkpoint that DeepSpeed can load")
        return Progress(step=state["step"], tokens=state["tokens"])


def _tag(step: int) -> str:
    return f"step_{step:09d}"


def _tag_pattern() -> str:
    return "step_" + "[0-9]" * 9
