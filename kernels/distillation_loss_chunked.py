"""The distillation loss in PyTorch, a few rows at a time; the formulas are in ``distillation_loss``.

Made for CPUs: a block of rows stays in cache while the dozen elementwise passes over it run, and nothing
as large as the logits is ever allocated except the gradient. Rows that do not count are never read.
Other devices get correct results too, at the price of host synchronisations.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from distilspeed.kernels.backend import accumulation_dtype
from distilspeed.kernels.distillation_loss_rows import LossRows, RowLosses, RowStatistics

# Of one block in the accumulation dtype; three or four are alive at a time, and should stay in L2. The soft
# term's forward and backward for 1024 x 30522 fp32 took 0.15 to 0.18 s with 0.5 to 2 MiB, 0.22 s with 4, 0.30 s
# with 30 (2 idle cores of 2 MiB L2, November 2026). The upper end: on a busy machine every pass over a block
# waits for the slower thread, so fewer are better.
BLOCK_BYTES = 2 * 2**20

RowSelection = slice | Tensor


def forward(rows: LossRows) -> tuple[RowLosses, RowStatistics]:
    """Per-row losses and softmax statistics, in float32 (float64 for float64 logits)."""
    dtype = accumulation_dtype(rows.student_logits)
    zeros = rows.student_logits.new_zeros
    losses = RowLosses(*(zeros(rows.num_rows, dtype=dtype) for _ in RowLosses._fields))
    statistics = RowStatistics(*(zeros(rows.num_rows, dtype=dtype) for _ in RowStatistics._fields))
    for block in row_blocks(rows, rows.soft_mask):
        soft_forward(rows, block, losses, statistics)
    if rows.labels is not None:
        for block in row_blocks(rows, rows.labels != rows.ignore_index):
            hard_forward(rows, rows.labels[block], block, losses, statistics)
    return losses, statistics


def soft_forward(rows: LossRows, block: RowSelection, losses: RowLosses, statistics: RowStatistics) -> None:
    student_max, student = shifted_to_maximum(real_columns(rows, rows.student_logits, block))
    teacher_max, teacher = shifted_to_maximum(real_columns(rows, rows.teacher_logits, block))
    student.mul_(1 / rows.temperature)
    teacher.mul_(1 / rows.temperature)
    student_sum = student.exp().sum(1)
    weights = teacher.exp()
    teacher_sum = weights.sum(1)

    losses.soft_ce[block] = student_sum.log() - weighted_sum(weights, student) / teacher_sum
    # Not cross-entropy minus entropy: of the difference of two large numbers little is left once the
    # student is good.
    mean_difference = weighted_sum(weights, teacher.sub_(student)) / teacher_sum
    losses.kl[block] = mean_difference + (student_sum / teacher_sum).log()

    statistics.student_max[block] = student_max
    statistics.student_sum[block] = student_sum
    statistics.teacher_max[block] = teacher_max
    statistics.teacher_sum[block] = teacher_sum


def hard_forward(
    rows: LossRows, labels: Tensor, block: RowSelection, losses: RowLosses, statistics: RowStatistics
) -> None:
    student_max, student = shifted_to_maximum(real_columns(rows, rows.student_logits, block))
    label_logits = student.gather(1, labels.unsqueeze(1)).squeeze(1)
    hard_sum = student.exp_().sum(1)
    losses.hard_ce[block] = hard_sum.log() - label_logits
    statistics.student_max[block] = student_max
    statistics.hard_sum[block] = hard_sum


def backward(rows: LossRows, statistics: RowStatistics, coefficients: Tensor, gradient: Tensor) -> None:
    """Write the gradient with respect to the student's logits.

    coefficients  [2], accumulation dtype: what multiplies q - p, and softmax(z) - onehot(y). They hold
                  the loss scale, so that rounding to the logits' dtype is the last thing that happens
    gradient      [rows, width]; may be ``rows.student_logits`` itself
    """
    soft_coefficient, hard_coefficient = coefficients.unbind()
    labelled = None if rows.labels is None else rows.labels != rows.ignore_index
    active = rows.soft_mask if rows.soft_mask is None or labelled is None else rows.soft_mask | labelled
    numbers = torch.arange(rows.num_rows, device=gradient.device)

    for block in row_blocks(rows, active):
        block_rows = numbers[block]
        if rows.soft_mask is None or rows.soft_mask[block].all():
            block_gradient = soft_gradient(rows, block, statistics, soft_coefficient)
        else:
            soft = rows.soft_mask[block]
            block_gradient = coefficients.new_zeros(len(block_rows), rows.vocab_size)
            block_gradient[soft] = soft_gradient(rows, block_rows[soft], statistics, soft_coefficient)
        if rows.labels is not None and labelled is not None:
            hard = labelled[block]
            labels = rows.labels[block][hard]
            block_gradient[hard] += hard_gradient(
                rows, labels, block_rows[hard], statistics, hard_coefficient
            )
        gradient[block, : rows.vocab_size] = block_gradient.to(gradient.dtype)

    # Last, because the gradient may share the storage that was read above.
    gradient[:, rows.vocab_size :] = 0
    if active is not None:
        gradient[~active] = 0


def soft_gradient(
    rows: LossRows, block: RowSelection, statistics: RowStatistics, coefficient: Tensor
) -> Tensor:
    """coefficient * (q - p), each softmax's division folded into the factor it is multiplied by."""
    student = real_columns(rows, rows.student_logits, block)
    teacher = real_columns(rows, rows.teacher_logits, block)
    inverse_temperature = 1 / rows.temperature
    student_weights = (student - statistics.student_max[block].unsqueeze(1)).mul_(inverse_temperature).exp_()
    teacher_weights = (teacher - statistics.teacher_max[block].unsqueeze(1)).mul_(inverse_temperature).exp_()
    student_factor = coefficient / statistics.student_sum[block]
    teacher_factor = coefficient / statistics.teacher_sum[block]
    student_weights.mul_(student_factor.unsqueeze(1))
    return student_weights.addcmul_(teacher_weights, teacher_factor.unsqueeze(1), value=-1)


def hard_gradient(
    rows: LossRows, labels: Tensor, block: Tensor, statistics: RowStatistics, coefficient: Tensor
) -> Tensor:
    """coefficient * (softmax(z) - onehot(y)) for rows that all have a label."""
    student = real_columns(rows, rows.student_logits, block)
    weights = (student - statistics.student_max[block].unsqueeze(1)).exp_()
    weights.mul_((coefficient / statistics.hard_sum[block]).unsqueeze(1))
    return weights.scatter_add_(1, labels.unsqueeze(1), (-coefficient).expand(len(labels), 1))


def row_blocks(rows: LossRows, selected: Tensor | None) -> Iterator[RowSelection]:
    """Blocks of the selected rows: slices where all are selected, which need no gathering."""
    row_bytes = rows.vocab_size * accumulation_dtype(rows.student_logits).itemsize
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    if selected is None or selected.all():
        yield from (slice(start, start + block_rows) for start in range(0, rows.num_rows, block_rows))
    elif selected.any():
        yield from selected.nonzero().squeeze(1).split(block_rows)


def real_columns(rows: LossRows, logits: Tensor, block: RowSelection) -> Tensor:
    return logits[block, : rows.vocab_size].to(accumulation_dtype(logits))


def shifted_to_maximum(logits: Tensor) -> tuple[Tensor, Tensor]:
    maximum = logits.amax(1)
    return maximum, logits - maximum.unsqueeze(1)


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Row sums of weights * values where a weight of 0 silences an infinite or undefined value."""
    sums = torch.linalg.vecdot(weights, values)
    # Only rows with -inf logits come out as NaN; the exact product costs an extra pass, so only they pay.
    undefined = sums.isnan()
    if undefined.any():
        weights, values = weights[undefined], values[undefined]
        sums[undefined] = torch.where(weights > 0, weights * values, 0).sum(1)
    return sums
