"""The cosine loss in C++ on CPUs, for float32, bfloat16 and float16; see ``cpu/cosine_loss.h``."""

import torch
from torch import Tensor

from distilspeed.kernels.implementation.cpu_kernels import cpu_operators


def forward(
    student: Tensor, teacher: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row losses, student factors and teacher factors, each float32 [rows]."""
    row_losses, student_factor, teacher_factor = (
        student.new_empty(student.shape[0], dtype=torch.float32) for _ in range(3)
    )
    cpu_operators().cosine_loss_forward(
        student, teacher, mask, eps, row_losses, student_factor, teacher_factor
    )
    return row_losses, student_factor, teacher_factor


def backward(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    student_factor: Tensor,
    teacher_factor: Tensor,
    scale: Tensor,
) -> Tensor:
    """Return the gradient with respect to the student's hidden states, [rows, hidden size] in their dtype."""
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    cpu_operators().cosine_loss_backward(
        student, teacher, mask, student_factor, teacher_factor, scale, gradient
    )
    return gradient
