"""Check that a run can train here: the device and the run's folder. A plan needs neither check."""

import os
from pathlib import Path

import torch

from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.student import check_precision
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.objective.kernel_check import check_kernels
from distilspeed.trainer.training.arguments import TrainArguments


def check_device(config: DeepSpeedConfig, device: torch.device) -> None:
    """Raise a UserError unless the device supports the config's precision and runs the loss kernels."""
    check_precision(config.precision, device)
    check_kernels(device)


def check_output_dir(arguments: TrainArguments) -> None:
    """Raise a UserError unless the run's folder is writable, and is empty or will be resumed."""
    folder = arguments.output_dir.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(
            "unwritable-output",
            f"--output_dir {arguments.output_dir}: {nearest} is not a directory; choose another",
        )
    if not os.access(nearest, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(
            "unwritable-output",
            f"--output_dir {arguments.output_dir}: {nearest} is not writable; choose another",
        )
    inputs = [("--data_dir", arguments.data_dir), ("--teacher", Path(arguments.teacher))]
    if arguments.student is not None:
        inputs.append(("--student", Path(arguments.student)))
    for flag, given in inputs:
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise UserError(
                "output-inside-input",
                f"--output_dir {arguments.output_dir} is inside {flag} {given}; choose a folder outside",
            )
    if not arguments.resume and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            "output-exists",
            f"{arguments.output_dir} is not empty; continue with --resume, or choose another --output_dir",
        )
