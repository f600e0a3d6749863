"""Whether the loss kernels run on a device: some versions of Triton compile their launcher when they first run."""

import subprocess
import sysconfig
from pathlib import Path

import torch

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss
from distilspeed.trainer.errors import UserError, first_line

INSTALL_COMPILER = "install gcc, or name a C compiler in CC"


def check_kernels(device: torch.device) -> None:
    """Run the losses once, in small, on a CUDA device.

    Raises:
        UserError: they cannot run there.
    """
    if device.type != "cuda":
        return
    try:
        run_losses(device)
    except Exception as error:  # Triton's, its compiler's, the driver's, or the device's
        raise UserError(
            "unusable-kernels", f"the loss kernels cannot run on {device}: {_reason_and_mend(error)}"
        ) from error


def run_losses(device: torch.device) -> None:
    """Forward and backward of both losses, on logits [2, 64] and hidden states of the same shape."""
    student = torch.linspace(-1, 1, 128, device=device).view(2, 64)
    teacher = student.flip(1)
    labels = torch.tensor([3, -100], device=device)
    student.requires_grad_()
    losses = weighted_distillation_loss(student, teacher, labels)
    (losses.loss + cosine_loss(student, teacher)).backward()
    if student.grad is None or not student.grad.isfinite().all():
        raise FloatingPointError("their gradient is not finite")


def _reason_and_mend(error: Exception) -> str:
    if "C compiler" in str(error):
        return f"Triton finds no C compiler; {INSTALL_COMPILER}"
    if isinstance(error, FileNotFoundError):
        return f"there is no {error.filename}, which Triton compiles with; {INSTALL_COMPILER}"
    if isinstance(error, subprocess.CalledProcessError):
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.exists():
            return (
                f"Triton compiles with Python's headers, and there is no {header}; install them (python3-dev)"
            )
        return f"{error.cmd[0]}, with which Triton compiles, has failed; see what it says above"
    return f"{first_line(error)}; see --debug, and the versions of torch, Triton and driver"
