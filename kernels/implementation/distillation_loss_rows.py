"""What the implementations of the distillation loss are given and give back.

An implementation is a module with three functions, all of which count only rows that are soft or labelled:

    forward(rows) -> table                                    losses, and what the backward pass needs
    backward(rows, table, coefficients, gradient)             writes the gradient from logits and table
    forward_backward(rows, coefficients, gradient) -> losses  both at once, for a known upstream gradient

    table         [8, rows], accumulation dtype; its rows are the fields of :class:`RowTable`
    losses        [3, rows], the first three of them
    coefficients  [2], accumulation dtype: c_soft and c_hard, what multiplies q - p and softmax(z) -
                  onehot(y). They hold means, loss weights and loss scale, so that rounding to the
                  logits' dtype is the last thing that happens to a gradient
    gradient      [rows, width], the logits' dtype; may be ``rows.student_logits`` itself

``distillation_loss_triton`` runs on GPUs, ``distillation_loss_chunked`` everywhere else. Neither knows of
means, loss weights or autograd; ``distillation_loss`` holds those once for both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from distilspeed.kernels.implementation.backend import accumulation_dtype
from distilspeed.kernels.implementation.checks import as_rows, check_pair, check_row_tensor, check_settings


class LossRows(NamedTuple):
    """Logits as rows, and which rows count.

    student_logits  [rows, width], the last dimension contiguous, any row stride
    teacher_logits  [rows, width], likewise
    labels          [rows] int64, contiguous; None: no row is labelled
    soft_mask       [rows] bool, contiguous; None: every row has a soft target
    vocab_size      columns that are real; those from vocab_size to width are padding
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
        """[rows] bool."""
        return None if self.labels is None else self.labels != self.ignore_index


def loss_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float,
    ignore_index: int,
    vocab_size: int | None,
) -> LossRows:
    """The arguments of ``distillation_loss``, checked, with all leading dimensions made one.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the teacher requires grad, the temperature is not a
            positive number, or there are not ``vocab_size`` columns.
    """
    check_pair("logits", student_logits, teacher_logits)
    check_row_tensor("labels", labels, torch.int64, student_logits)
    check_row_tensor("soft_mask", soft_mask, torch.bool, student_logits)
    vocab_size = check_settings(temperature, vocab_size, student_logits.shape[-1])
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
    """Eight numbers a row: its losses, and what the backward pass needs to rebuild its three softmaxes.

    The losses are not yet multiplied by T^2, and 0 in rows that do not count. With z the student's and u
    the teacher's logits:

        softmax(z / T) = exp((z - student_max) / T) / student_sum
        softmax(u / T) = exp((u - teacher_max) / T) / teacher_sum
        softmax(z)     = exp(z - student_max) / hard_sum

    Maximum and sum are kept apart, not added up to a logsumexp: at logits of 1e4 a float32 logsumexp is
    off by 5e-4, and so would be every probability; and the sum needs no further exponential.
    Undefined for softmaxes that the row does not take part in.
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
    """[fields, rows] in the accumulation dtype."""
    shape = (fields, student_logits.shape[0])
    return student_logits.new_empty(shape, dtype=accumulation_dtype(student_logits))


def means(
    losses: Tensor, temperature: float, soft_normalizer: Tensor, hard_normalizer: Tensor
) -> tuple[Tensor, ...]:
    """kl, soft_ce and hard_ce as ``distillation_loss`` defines them, from the sums [3] of row losses."""
    kl, soft_ce, hard_ce = losses.unbind()
    soft_factor = temperature**2 / soft_normalizer
    return kl * soft_factor, soft_ce * soft_factor, hard_ce / hard_normalizer
