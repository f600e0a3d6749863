"""Inputs and outputs of the implementations of the distillation loss.

An implementation is a module with three functions. All three ignore rows that are neither soft nor labelled:

    forward(rows) -> table                                    losses and statistics for the backward pass
    backward(rows, table, coefficients, gradient)             writes the gradient from logits and table
    forward_backward(rows, coefficients, gradient) -> losses  both at once, for a known upstream gradient

    table         [8, rows], accumulation dtype; its rows are the fields of :class:`RowTable`
    losses        [3, rows], the first three rows of a table
    coefficients  [2], accumulation dtype: c_soft and c_hard, the factors of q - p and softmax(z) -
                  onehot(y). They include normalizers, loss weights and loss scale, so that rounding
                  to the logits' dtype is the last operation on a gradient
    gradient      [rows, student's width], the logits' dtype; may be ``rows.student_logits`` itself

``backend`` says which implementation runs where. Means, loss weights and autograd are in ``distillation_loss`` and
``weighted_distillation_loss``, once for all.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distilspeed.kernels.implementation.backend import accumulation_dtype
from distilspeed.kernels.implementation.checks import as_rows, check_pair, check_row_tensor, check_settings


class LossRows(NamedTuple):
    """Logits as rows, with labels and mask.

    student_logits  [rows, width], the last dimension contiguous, any row stride
    teacher_logits  [rows, width], the same, but the width may differ
    labels          [rows] int64, contiguous; None: no row is labelled
    soft_mask       [rows] bool, contiguous; None: every row is soft
    vocab_size      number of real columns of both; those from vocab_size to a width are padding
    """

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None
    soft_mask: Tensor | None
    temperature: float
    ignore_index: int
    vocab_size: int

    @property
    def num_rows(self) -> int:
        return self.student_logits.shape[0]

    @property
    def labelled(self) -> Tensor | None:
        """[rows] bool; None: no row is labelled."""
        return None if self.labels is None else self.labels != self.ignore_index

    @property
    def counted(self) -> Tensor | None:
        """[rows] bool, True for soft or labelled rows; None: all rows."""
        if self.soft_mask is None or self.labelled is None:
            return self.soft_mask
        return self.soft_mask | self.labelled


def loss_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int | None,
) -> LossRows:
    """Check the arguments of ``distillation_loss`` and flatten their leading dimensions into one.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the teacher requires grad, the temperature is not a
            positive number, or the logits have fewer than ``vocab_size`` columns.
    """
    check_pair("logits", student_logits, teacher_logits, same_width=vocab_size is None)
    check_row_tensor("labels", labels, torch.int64, student_logits)
    check_row_tensor("soft_mask", soft_mask, torch.bool, student_logits)
    vocab_size = check_settings(
        temperature, vocab_size, min(student_logits.shape[-1], teacher_logits.shape[-1])
    )
    return LossRows(
        as_rows(student_logits),
        as_rows(teacher_logits),
        None if labels is None else labels.reshape(-1).contiguous(),
        None if soft_mask is None else soft_mask.reshape(-1).contiguous(),
        float(temperature),
        ignore_index,
        vocab_size,
    )


class RowTable(NamedTuple):
    """Eight numbers per row: the losses, and the statistics from which the backward pass computes the softmaxes.

    The losses are not yet multiplied by T^2; they are 0 in rows that are not soft (kl, soft_ce) or not labelled
    (hard_ce). With z the student's and u the teacher's logits:

        softmax(z / T) = exp((z - student_max) / T) / student_sum
        softmax(u / T) = exp((u - teacher_max) / T) / teacher_sum
        softmax(z)     = exp(z - student_max) / hard_sum

    Maximum and sum are stored separately, not as a logsumexp: at logits of 1e4 a float32 logsumexp has an error
    of 5e-4, which every probability would inherit; and a stored sum saves an exponential. The teacher's
    statistics are undefined in rows that are not soft, hard_sum in rows that are not labelled.
    """

    kl: Tensor
    soft_ce: Tensor
    hard_ce: Tensor
    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    hard_sum: Tensor


LOSS_FIELDS = 3


def empty_table(student_logits: Tensor, fields: int) -> Tensor:
    """Return an uninitialised table [fields, rows] in the accumulation dtype."""
    shape = (fields, student_logits.shape[0])
    return student_logits.new_empty(shape, dtype=accumulation_dtype(student_logits))


def means(
    losses: Tensor, temperature: float, soft_normalizer: Tensor, hard_normalizer: Tensor
) -> tuple[Tensor, ...]:
    """Return kl, soft_ce and hard_ce as ``distillation_loss`` defines them, from the sums [3] of row losses."""
    kl, soft_ce, hard_ce = losses.unbind()
    soft_factor = temperature**2 / soft_normalizer
    return kl * soft_factor, soft_ce * soft_factor, hard_ce / hard_normalizer
