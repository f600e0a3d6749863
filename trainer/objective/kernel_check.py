"""Check that the loss kernels run on a device.

Some Triton versions compile a launcher on first use, and the kernels for CPUs are compiled on first use.
"""

import subprocess
import sysconfig
from pathlib import Path

import torch

from distilspeed.kernels.cosine_loss import cosine_loss
from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss
from distilspeed.trainer.errors import UserError, first_line

INSTALL_COMPILER = "install gcc, or set CC to a C compiler"


def check_kernels(device: torch.device) -> None:
    """Run the losses once on tiny inputs.

    Raises:
        UserError: the losses cannot run on the device.
    """
    try:
        run_losses(device)
    except Exception as error:  # from Triton, its compiler, the driver or the device
        raise UserError(
            "unusable-kernels", f"the loss kernels cannot run on {device}: {_reason_and_mend(error)}"
        ) from error


def run_losses(device: torch.device) -> None:
    """Run forward and backward of both losses on logits [2, 64] and hidden states of the same shape."""
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
        return f"Triton's C compiler {error.filename} does not exist; {INSTALL_COMPILER}"
    if isinstance(error, subprocess.CalledProcessError):
        header = Path(sysconfig.get_path("include")) / "Python.h"
        if not header.exists():
            return f"Triton needs Python's headers, but {header} does not exist; install them (python3-dev)"
        return f"Triton's C compiler {error.cmd[0]} failed; see its output above"
    return f"{first_line(error)}; run with --debug, and check the versions of torch, Triton and driver"
