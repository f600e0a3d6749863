"""Checks of the losses' arguments, and their shapes and normalizers in one form."""

import math

import torch
from torch import Tensor

from distilspeed.kernels.implementation.backend import accumulation_dtype

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_pair(kind: str, student: Tensor, teacher: Tensor, same_width: bool = True) -> None:
    """Check that the teacher's tensor matches the student's and is frozen; ``kind`` is "logits" or "hidden".

    Without ``same_width``, the last dimensions may differ.
    """
    check_floating_point(f"student_{kind}", student)
    shape = student.shape if same_width else (*student.shape[:-1], *teacher.shape[-1:])
    if teacher.shape != shape:
        raise ValueError(
            f"teacher_{kind} must have the shape of student_{kind}, {list(student.shape)}, "
            f"not {list(teacher.shape)}"
        )
    if teacher.dtype != student.dtype:
        raise ValueError(
            f"teacher_{kind} must have the dtype of student_{kind}, {student.dtype}, not {teacher.dtype}"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_{kind} must be on the device of student_{kind}, {student.device}, not {teacher.device}"
        )
    if teacher.requires_grad:
        raise ValueError(f"teacher_{kind} must not require grad; run the teacher under torch.no_grad()")


def check_can_be_saved(kind: str, student: Tensor, teacher: Tensor) -> None:
    """Check that autograd can save the teacher's tensor for the backward pass."""
    needs_gradient = torch.is_grad_enabled() and student.requires_grad
    if not torch.compiler.is_compiling() and needs_gradient and teacher.is_inference():
        raise ValueError(
            f"teacher_{kind} come from torch.inference_mode(); run the teacher under torch.no_grad()"
        )


def check_constants(**settings: object) -> None:
    """Check that no setting requires grad: it would silently get none."""
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name} must not require grad, because it gets no gradient; detach it (a trained weight can multiply "
                "the losses of distillation_loss)"
            )


def check_floating_point(name: str, tensor: Tensor) -> None:
    if tensor.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension")
    if tensor.dtype not in INPUT_DTYPES:
        raise ValueError(f"{name} must be a floating-point tensor, not {tensor.dtype}")


def check_row_tensor(name: str, tensor: Tensor | None, dtype: torch.dtype, student: Tensor) -> None:
    """Check that ``tensor`` is None or has one value per row of ``student`` [..., features], on its device."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.shape != student.shape[:-1]:
        raise ValueError(f"{name} must have the shape {list(student.shape[:-1])}, not {list(tensor.shape)}")
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on {student.device}, not {tensor.device}")


def resolve_normalizer(
    name: str, normalizer: float | Tensor | None, student: Tensor, selected: Tensor | None
) -> Tensor:
    """Return the divisor of a sum over rows, as a 0-dim tensor on the device of ``student`` [..., features].

    ``normalizer`` None: the number of selected rows, at least 1. ``selected`` None: all rows are selected.
    """
    check_constants(**{name: normalizer})
    dtype = accumulation_dtype(student)
    if normalizer is None:
        normalizer = max(1, student.shape[:-1].numel()) if selected is None else selected.sum().clamp(min=1)
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0 or normalizer.device != student.device:
            raise ValueError(
                f"{name} must be a number or a 0-dim tensor on {student.device}, "
                f"not of shape {list(normalizer.shape)} on {normalizer.device}"
            )
        return normalizer.detach().to(dtype)
    if not 0 < normalizer < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {normalizer}")
    return torch.full((), normalizer, dtype=dtype, device=student.device)


def check_settings(temperature: float, vocab_size: int | None, width: int) -> int:
    """Check the settings; return the number of real columns: ``vocab_size``, or ``width`` if it is None."""
    if width < 1:
        raise ValueError("logits must have at least one column")
    check_constants(temperature=temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if vocab_size is not None and not 1 <= vocab_size <= width:
        raise ValueError(f"vocab_size must be from 1 to {width}, not {vocab_size}")
    return width if vocab_size is None else vocab_size


def check_writable(student_logits: Tensor, rows: Tensor) -> None:
    """Raise if a gradient must not overwrite the logits; ``rows`` is the view of ``student_logits`` as rows."""
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError("the gradient cannot be written over student_logits: their rows share memory")
    for tensor in (student_logits, student_logits._base):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError(
                "the gradient cannot be written over student_logits: they are a leaf of the graph"
            )


def as_rows(tensor: Tensor) -> Tensor:
    """Return [..., features] as [rows, features], the last dimension contiguous; copies only if there is no view."""
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
