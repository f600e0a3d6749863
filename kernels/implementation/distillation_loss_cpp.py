"""The distillation loss in C++ on CPUs, for float32, bfloat16 and float16; see ``cpu/distillation_loss.h``."""

from torch import Tensor

from distilspeed.kernels.implementation.cpu_kernels import cpu_operators
from distilspeed.kernels.implementation.distillation_loss_chunked import checked_labelled
from distilspeed.kernels.implementation.distillation_loss_rows import (
    LOSS_FIELDS,
    LossRows,
    RowTable,
    empty_table,
)


def forward(rows: LossRows) -> Tensor:
    """Return the row table [8, rows], float32."""
    checked_labelled(rows)
    table = empty_table(rows.student_logits, len(RowTable._fields)).zero_()
    cpu_operators().distillation_loss_forward(*rows, table)
    return table


def backward(rows: LossRows, table: Tensor, coefficients: Tensor, gradient: Tensor) -> None:
    """Write the gradient with respect to the student's logits; see ``distillation_loss_rows``."""
    cpu_operators().distillation_loss_backward(*rows, table, coefficients, gradient)


def forward_backward(rows: LossRows, coefficients: Tensor, gradient: Tensor) -> Tensor:
    """Return row losses [3, rows] and write the gradient; the logits are read once."""
    checked_labelled(rows)
    losses = empty_table(rows.student_logits, LOSS_FIELDS).zero_()
    cpu_operators().distillation_loss_forward_backward(*rows, losses, coefficients, gradient)
    return losses
