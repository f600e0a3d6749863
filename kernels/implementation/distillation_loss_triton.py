"""The distillation loss on a GPU: launch the kernel of ``distillation_loss_kernel``."""

import math

from torch import Tensor

from distilspeed.kernels.implementation.backend import launch_device
from distilspeed.kernels.implementation.distillation_loss_kernel import distillation_loss_kernel
from distilspeed.kernels.implementation.distillation_loss_rows import (
    LOSS_FIELDS,
    LossRows,
    RowTable,
    empty_table,
)
from distilspeed.kernels.implementation.launch_configs import (
    ACCESS_BYTES,
    LaunchConfig,
    Pass,
    launch_config,
    tile_constants,
)


def forward(rows: LossRows) -> Tensor:
    """Return the row table [8, rows], float32; see ``distillation_loss_rows``."""
    table = empty_table(rows.student_logits, len(RowTable._fields))
    launch("forward", rows, table, coefficients=table, gradient=rows.student_logits)
    return table


def backward(rows: LossRows, table: Tensor, coefficients: Tensor, gradient: Tensor) -> None:
    """Write the gradient with respect to the student's logits."""
    launch("backward", rows, table, coefficients, gradient)


def forward_backward(rows: LossRows, coefficients: Tensor, gradient: Tensor) -> Tensor:
    """Return row losses [3, rows] and write the gradient in one launch.

    Each row is read twice: the second time from cache if the launch keeps few enough rows in flight for the GPU's
    second-level cache (``profiling.tuning``), else from memory.
    """
    losses = empty_table(rows.student_logits, LOSS_FIELDS)
    launch("forward_backward", rows, losses, coefficients, gradient)
    return losses


def launch(
    pass_name: Pass,
    rows: LossRows,
    table: Tensor,
    coefficients: Tensor,
    gradient: Tensor,
    config: LaunchConfig | None = None,
) -> None:
    """Run one pass; tensors that the pass does not use may be any tensor. ``config`` None: the table's launch."""
    student, teacher = rows.student_logits, rows.teacher_logits
    if config is None:
        config = launch_config(pass_name, student, rows.vocab_size)
    if rows.num_rows == 0:
        return
    with launch_device(student):
        distillation_loss_kernel[(rows.num_rows,)](
            student,
            teacher,
            gradient,
            student if rows.labels is None else rows.labels,
            student if rows.soft_mask is None else rows.soft_mask,
            table,
            coefficients,
            rows.num_rows,
            student.stride(0),
            teacher.stride(0),
            gradient.stride(0),
            rows.ignore_index,
            1 / rows.temperature,
            LOSSES=pass_name != "backward",
            GRADIENT=pass_name != "forward",
            VOCAB_SIZE=rows.vocab_size,
            WIDTH=student.shape[1],
            TEACHER_WIDTH=teacher.shape[1],
            **tile_constants(config, alignment(student, teacher, gradient), student.element_size()),
            HAS_LABELS=rows.labels is not None,
            HAS_MASK=rows.soft_mask is not None,
            TEMPERATURE_IS_2=rows.temperature == 2,
            # Elsewhere than over the logits, the gradient would push rows that are read again out of the cache.
            EVICTION="" if gradient.data_ptr() == student.data_ptr() else "evict_first",
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )


def alignment(*matrices: Tensor) -> int:
    """Return the number of elements, up to a widest access, that every row of all matrices is aligned to."""
    itemsize = matrices[0].element_size()
    elements = ACCESS_BYTES // itemsize
    for matrix in matrices:
        elements = math.gcd(elements, matrix.data_ptr() // itemsize, matrix.stride(0), matrix.shape[1])
    return elements
