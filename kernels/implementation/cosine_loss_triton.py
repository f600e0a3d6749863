"""The cosine loss in Triton: one program per row; formulas and factors are in ``cosine_loss``.

Forward reads each hidden state once and writes three float32 numbers per row: the loss and the two factors of
the gradient. Backward reads each hidden state once more and writes

    scale * (student_factor * h - teacher_factor * t)

computed in float32 (``scale`` includes the loss scale) and rounded to the hidden states' dtype once, at the
store. Neither pass reads masked-out rows.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have their types in comments: Triton interprets annotations itself)

import torch
import triton
import triton.language as tl
from torch import Tensor

from distilspeed.kernels.implementation.backend import launch_device
from distilspeed.kernels.implementation.launch_configs import LaunchConfig


def cosine_launch_config(hidden: int) -> LaunchConfig:
    """Return tile width and warps for a hidden size: one tile per row up to 4096 columns, 8 columns per thread.

    8 half-precision numbers are the 16 bytes of a thread's widest load. One row per program keeps enough loads
    in flight: at 768 columns, 16 programs of 128 threads fill a V100's multiprocessor.
    """
    tile = min(4096, max(32, triton.next_power_of_2(hidden)))
    return LaunchConfig(tile, num_warps=max(1, tile // 256))


@triton.jit
def row_counts(row, mask_ptr, HAS_MASK: tl.constexpr):
    counts = tl.full((), True, tl.int1)
    if HAS_MASK:
        counts = tl.load(mask_ptr + row) != 0
    return counts


@triton.jit
def forward_kernel(
    student_ptr,  # [rows, HIDDEN] fp16, bf16 or fp32
    teacher_ptr,  # [rows, HIDDEN] the same dtype
    mask_ptr,  # [rows] bool; any pointer without HAS_MASK
    row_loss_ptr,  # [rows] fp32
    student_factor_ptr,  # [rows] fp32
    teacher_factor_ptr,  # [rows] fp32
    student_stride,  # elements from one row to the next
    teacher_stride,
    EPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride may exceed 2^31
    row_loss = tl.full((), 0.0, tl.float32)
    student_factor = tl.full((), 0.0, tl.float32)
    teacher_factor = tl.full((), 0.0, tl.float32)
    if row_counts(row, mask_ptr, HAS_MASK):
        dot = tl.zeros([TILE], tl.float32)
        student_square = tl.zeros([TILE], tl.float32)
        teacher_square = tl.zeros([TILE], tl.float32)
        for start in range(0, HIDDEN, TILE):
            columns = start + tl.arange(0, TILE)
            inside = columns < HIDDEN
            student = tl.load(student_ptr + row * student_stride + columns, mask=inside, other=0.0)
            teacher = tl.load(teacher_ptr + row * teacher_stride + columns, mask=inside, other=0.0)
            student = student.to(tl.float32)
            teacher = teacher.to(tl.float32)
            dot += student * teacher
            student_square += student * student
            teacher_square += teacher * teacher
        student_norm = tl.sqrt(tl.sum(student_square, 0))
        teacher_norm = tl.sqrt(tl.sum(teacher_square, 0))
        # Comparisons instead of maxima: NaN in a row must reach the loss.
        student_length = tl.where(student_norm < EPS, EPS, student_norm)
        teacher_length = tl.where(teacher_norm < EPS, EPS, teacher_norm)
        teacher_factor = 1 / (student_length * teacher_length)
        cosine = tl.sum(dot, 0) * teacher_factor
        # A norm below eps is clamped to a constant, so its derivative is 0.
        student_factor = tl.where(student_norm <= EPS, 0.0, cosine / (student_length * student_length))
        row_loss = 1 - cosine

    tl.store(row_loss_ptr + row, row_loss)
    tl.store(student_factor_ptr + row, student_factor)
    tl.store(teacher_factor_ptr + row, teacher_factor)


@triton.jit
def backward_kernel(
    student_ptr,  # [rows, HIDDEN] fp16, bf16 or fp32
    teacher_ptr,  # [rows, HIDDEN] the same dtype
    gradient_ptr,  # [rows, HIDDEN] the same dtype, contiguous
    mask_ptr,  # [rows] bool; any pointer without HAS_MASK
    student_factor_ptr,  # [rows] fp32
    teacher_factor_ptr,  # [rows] fp32
    scale_ptr,  # [] fp32
    student_stride,  # elements from one row to the next
    teacher_stride,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride may exceed 2^31
    counts = row_counts(row, mask_ptr, HAS_MASK)
    scale = tl.load(scale_ptr)
    student_factor = scale * tl.load(student_factor_ptr + row)
    teacher_factor = scale * tl.load(teacher_factor_ptr + row)
    for start in range(0, HIDDEN, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < HIDDEN
        gradient = tl.zeros([TILE], tl.float32)
        if counts:
            student = tl.load(student_ptr + row * student_stride + columns, mask=inside, other=0.0)
            teacher = tl.load(teacher_ptr + row * teacher_stride + columns, mask=inside, other=0.0)
            gradient = student_factor * student.to(tl.float32) - teacher_factor * teacher.to(tl.float32)
        gradient = gradient.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * HIDDEN + columns, gradient, mask=inside)


def forward(
    student: Tensor, teacher: Tensor, mask: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row losses, student factors and teacher factors, each [rows] float32."""
    num_rows, hidden = student.shape
    row_losses, student_factor, teacher_factor = (
        student.new_empty(num_rows, dtype=torch.float32) for _ in range(3)
    )
    tile, num_warps = cosine_launch_config(hidden)
    if num_rows > 0:
        with launch_device(student):
            forward_kernel[(num_rows,)](
                student,
                teacher,
                student if mask is None else mask,
                row_losses,
                student_factor,
                teacher_factor,
                student.stride(0),
                teacher.stride(0),
                eps,
                hidden,
                tile,
                mask is not None,
                num_warps=num_warps,
                enable_fp_fusion=True,
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
    """Return the gradient with respect to the student's hidden states, [rows, hidden] in their dtype."""
    num_rows, hidden = student.shape
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    tile, num_warps = cosine_launch_config(hidden)
    if num_rows > 0:
        with launch_device(student):
            backward_kernel[(num_rows,)](
                student,
                teacher,
                gradient,
                student if mask is None else mask,
                student_factor,
                teacher_factor,
                scale,
                student.stride(0),
                teacher.stride(0),
                hidden,
                tile,
                mask is not None,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return gradient
