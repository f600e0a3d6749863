"""The distillation loss in PyTorch, a few rows at a time; the formulas are in ``distillation_loss``.

Made for CPUs: a block of rows stays in cache during its dozen elementwise passes. All passes write into the same
three buffers, because a fresh memory page costs more than the arithmetic on it. Rows that are neither soft nor
labelled are not read. Results are correct on other devices, too, but host and device synchronise there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from distilspeed.kernels.implementation.backend import accumulation_dtype, in_accumulation_dtype
from distilspeed.kernels.implementation.distillation_loss_rows import (
    LOSS_FIELDS,
    LossRows,
    RowTable,
    empty_table,
)

# Size of one of the three buffers. 1024 x 30522 fp32, loss and gradient in place: 140 to 160 ms with 1 to 8 MiB, 270
# with 0.5 (2 idle cores of 2 MiB L2, November 2026). On a busy machine every pass over a block waits for the slower
# thread, so fewer blocks are better; the three buffers' 7.5 MiB are small compared with the logits.
BLOCK_BYTES = 5 * 2**19


@dataclass(frozen=True)
class Block:
    """Some rows that are soft or labelled, and three work buffers [block, vocabulary]."""

    rows: slice | Tensor  # a slice if the rows are contiguous, else their indices
    soft_mask: Tensor | None  # [block] bool; None: all rows are soft
    labelled: Tensor  # [labelled rows] int64, indices within the block
    labelled_rows: Tensor  # [labelled rows] int64, indices among all rows
    labels: Tensor  # [labelled rows, 1] int64
    student: Tensor
    teacher: Tensor
    weights: Tensor

    @property
    def has_soft_rows(self) -> bool:
        return self.soft_mask is None or bool(self.soft_mask.any())


class SoftmaxesAtT(NamedTuple):
    """exp((z - max z) / T) and exp((u - max u) / T) of a block [block, vocabulary], and their sums [block]."""

    student: Tensor
    student_sum: Tensor
    teacher: Tensor
    teacher_sum: Tensor


class Softmaxes(NamedTuple):
    """The softmaxes of a block, not yet divided by their sums."""

    soft: SoftmaxesAtT | None  # None: no row of the block is soft
    hard: Tensor  # [labelled rows, vocabulary], exp(z - max z)
    hard_sum: Tensor  # [labelled rows]


def forward(rows: LossRows) -> Tensor:
    """Return the row table [8, rows], float32 (float64 for float64 logits)."""
    table = empty_table(rows.student_logits, len(RowTable._fields)).zero_()
    columns = RowTable(*table)
    for block in blocks(rows):
        softmaxes_with_losses(rows, block, columns)
    return table


def backward(rows: LossRows, table: Tensor, coefficients: Tensor, gradient: Tensor) -> None:
    """Write the gradient with respect to the student's logits; see ``distillation_loss_rows``."""
    columns = RowTable(*table)
    for block in blocks(rows):
        softmaxes = softmaxes_from_table(rows, block, columns)
        store(gradient[:, : rows.vocab_size], block, combine(block, softmaxes, coefficients))
    clear_what_does_not_count(rows, gradient)


def forward_backward(rows: LossRows, coefficients: Tensor, gradient: Tensor) -> Tensor:
    """Return row losses [3, rows] and write the gradient, with a third fewer exponentials than the two passes."""
    table = empty_table(rows.student_logits, len(RowTable._fields)).zero_()
    columns = RowTable(*table)
    for block in blocks(rows):
        softmaxes = softmaxes_with_losses(rows, block, columns)
        store(gradient[:, : rows.vocab_size], block, combine(block, softmaxes, coefficients))
    clear_what_does_not_count(rows, gradient)
    return table[:LOSS_FIELDS]


def softmaxes_with_losses(rows: LossRows, block: Block, table: RowTable) -> Softmaxes:
    student_logits = in_accumulation_dtype(rows.student_logits[block.rows, : rows.vocab_size], block.student)
    student_max = student_logits.amax(1)
    student = torch.sub(student_logits, student_max.unsqueeze(1), out=block.student)
    table.student_max[block.rows] = student_max

    hard = student[block.labelled]
    label_logits = hard.gather(1, block.labels)
    hard_sum = hard.exp_().sum(1)
    table.hard_sum[block.labelled_rows] = hard_sum
    table.hard_ce[block.labelled_rows] = hard_sum.log() - label_logits.squeeze(1)
    if not block.has_soft_rows:
        return Softmaxes(None, hard, hard_sum)

    teacher_logits = in_accumulation_dtype(rows.teacher_logits[block.rows, : rows.vocab_size], block.teacher)
    teacher_max = teacher_logits.amax(1)
    teacher = torch.sub(teacher_logits, teacher_max.unsqueeze(1), out=block.teacher)
    student.mul_(1 / rows.temperature)
    teacher.mul_(1 / rows.temperature)
    weights = torch.exp(teacher, out=block.weights)
    teacher_sum = weights.sum(1)
    # kl is not computed as cross-entropy minus entropy: once the student is good, that difference of two large
    # numbers loses its precision.
    mean_difference = weighted_sum(weights, teacher.sub_(student), out=block.teacher) / teacher_sum
    mean_student = weighted_sum(weights, student, out=block.teacher) / teacher_sum
    student_sum = student.exp_().sum(1)
    kl = mean_difference + (student_sum / teacher_sum).log()
    soft_ce = student_sum.log() - mean_student
    if block.soft_mask is not None:
        kl, soft_ce = (torch.where(block.soft_mask, loss, 0) for loss in (kl, soft_ce))
    table.kl[block.rows] = kl
    table.soft_ce[block.rows] = soft_ce
    table.student_sum[block.rows] = student_sum
    table.teacher_max[block.rows] = teacher_max
    table.teacher_sum[block.rows] = teacher_sum
    return Softmaxes(SoftmaxesAtT(student, student_sum, weights, teacher_sum), hard, hard_sum)


def softmaxes_from_table(rows: LossRows, block: Block, table: RowTable) -> Softmaxes:
    student_logits = in_accumulation_dtype(rows.student_logits[block.rows, : rows.vocab_size], block.student)
    student = torch.sub(student_logits, table.student_max[block.rows].unsqueeze(1), out=block.student)
    hard = student[block.labelled].exp_()
    hard_sum = table.hard_sum[block.labelled_rows]
    if not block.has_soft_rows:
        return Softmaxes(None, hard, hard_sum)
    teacher_logits = in_accumulation_dtype(rows.teacher_logits[block.rows, : rows.vocab_size], block.teacher)
    teacher = torch.sub(teacher_logits, table.teacher_max[block.rows].unsqueeze(1), out=block.teacher)
    student.mul_(1 / rows.temperature).exp_()
    teacher.mul_(1 / rows.temperature).exp_()
    soft = SoftmaxesAtT(student, table.student_sum[block.rows], teacher, table.teacher_sum[block.rows])
    return Softmaxes(soft, hard, hard_sum)


def combine(block: Block, softmaxes: Softmaxes, coefficients: Tensor) -> Tensor:
    """Return c_soft (q - p) + c_hard (softmax(z) - onehot(y)); divisions by sums are part of the factors."""
    soft_coefficient, hard_coefficient = coefficients.unbind()
    if softmaxes.soft is None:
        gradient = block.student.zero_()
    else:
        student, student_sum, teacher, teacher_sum = softmaxes.soft
        gradient = student.mul_((soft_coefficient / student_sum).unsqueeze(1))
        gradient.addcmul_(teacher, (soft_coefficient / teacher_sum).unsqueeze(1), value=-1)
        if block.soft_mask is not None:
            gradient[~block.soft_mask] = 0
    hard = softmaxes.hard.mul_((hard_coefficient / softmaxes.hard_sum).unsqueeze(1))
    hard.scatter_add_(1, block.labels, (-hard_coefficient).expand_as(block.labels))
    return gradient.index_add_(0, block.labelled, hard)


def store(gradient: Tensor, block: Block, values: Tensor) -> None:
    if isinstance(block.rows, slice):
        gradient[block.rows] = values  # the assignment rounds
    else:
        gradient[block.rows] = values.to(gradient.dtype)


def blocks(rows: LossRows) -> Iterator[Block]:
    """Yield the soft or labelled rows in order, as many at a time as fit the buffers."""
    row_bytes = rows.vocab_size * accumulation_dtype(rows.student_logits).itemsize
    block_rows = min(max(1, BLOCK_BYTES // row_bytes), max(1, rows.num_rows))
    buffers = rows.student_logits.new_empty(
        (3, block_rows, rows.vocab_size), dtype=accumulation_dtype(rows.student_logits)
    )
    numbers = torch.arange(rows.num_rows, device=rows.student_logits.device)
    has_label = checked_labelled(rows)
    counts = None if rows.soft_mask is None else rows.soft_mask | has_label
    for block in row_selections(rows.num_rows, counts, block_rows):
        soft_mask = None if rows.soft_mask is None or rows.soft_mask[block].all() else rows.soft_mask[block]
        labelled = has_label[block].nonzero().squeeze(1)
        in_all = numbers[block][labelled]
        labels = in_all if rows.labels is None else rows.labels[in_all]
        block_buffers = buffers[:, : len(numbers[block])]
        yield Block(block, soft_mask, labelled, in_all, labels.unsqueeze(1), *block_buffers)


def row_selections(num_rows: int, counts: Tensor | None, block_rows: int) -> Iterator[slice | Tensor]:
    if counts is None:
        yield from (slice(first, first + block_rows) for first in range(0, num_rows, block_rows))
        return
    for numbers in counts.nonzero().squeeze(1).split(block_rows):
        if len(numbers) > 0:
            first, last = numbers[0].item(), numbers[-1].item()
            neighbours = last - first + 1 == len(numbers)
            yield slice(first, last + 1) if neighbours else numbers  # a slice avoids gathering


def checked_labelled(rows: LossRows) -> Tensor:
    """Return [rows] bool: True for labelled rows.

    Raises:
        ValueError: a label is neither ``ignore_index`` nor in the vocabulary.
    """
    labels, labelled = rows.labels, rows.labelled
    if labels is None or labelled is None:
        return rows.student_logits.new_zeros(rows.num_rows, dtype=torch.bool)
    outside = ((labels < 0) | (labels >= rows.vocab_size)) & labelled
    if outside.any():
        label = labels[outside][0].item()
        raise ValueError(
            f"labels must be from 0 to {rows.vocab_size - 1} or {rows.ignore_index}, not {label}"
        )
    return labelled


def clear_what_does_not_count(rows: LossRows, gradient: Tensor) -> None:
    # Must run last: the gradient may share storage with the logits.
    gradient[:, rows.vocab_size :] = 0
    if rows.soft_mask is not None:
        labelled = rows.labelled
        gradient[~(rows.soft_mask if labelled is None else rows.soft_mask | labelled)] = 0


def weighted_sum(weights: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Return the row sums of weights * values; a weight of 0 contributes 0 even for an infinite or NaN value."""
    sums = torch.mul(weights, values, out=out).sum(1)
    # Only rows with -inf logits become NaN, and only those are summed a second time.
    undefined = sums.isnan()
    if undefined.any():
        sums[undefined] = out[undefined].masked_fill_(weights[undefined] == 0, 0).sum(1)
    return sums
