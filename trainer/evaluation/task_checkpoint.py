"""The checkpoint of a fine-tuning run: one file, replaced at every save."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.files import replacing, writing


@dataclass(frozen=True)
class TaskCheckpoint:
    """Where and when a run is saved.

    Attributes:
        path: the file.
        identity: the settings that must not change when the run is resumed.
        save_steps: steps between two saves.
    """

    path: Path
    identity: Mapping[str, Any]
    save_steps: int

    def is_due(self, step: int, steps: int) -> bool:
        return step % self.save_steps == 0 or step == steps

    def save(self, parts: Mapping[str, Any], step: int) -> None:
        """Write the states of the parts after a step.

        Raises:
            UserError: the file cannot be written.
        """
        state = {name: part.state_dict() for name, part in parts.items()}
        with writing(self.path), replacing(self.path) as file:
            torch.save({"identity": dict(self.identity), "step": step, "state": state}, file)

    def load(self, parts: Mapping[str, Any]) -> int:
        """Load the states of the parts, if there is a checkpoint; return the number of steps done.

        Raises:
            UserError: the file is damaged, or of a run with other settings.
        """
        if not self.path.exists():
            return 0
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            step, identity, state = int(saved["step"]), saved["identity"], saved["state"]
        except Exception as error:  # torch and zipfile raise many types
            raise UserError(
                "damaged-checkpoint",
                f"cannot read {self.path}: {first_line(error)}; remove it to start from the beginning",
            ) from error
        check_same_settings(self.path, identity, self.identity)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return step


def check_same_settings(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a UserError if a file is of a run with other settings."""
    for name, value in wanted.items():
        before = saved.get(name)
        if before != value:
            raise UserError(
                "changed-run",
                f"{path} is of a run with {name} {before}, not {value}; use the same settings, or choose "
                "another --output_dir",
            )
