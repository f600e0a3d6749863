"""What the implementations of the distillation loss are given and give back.

An implementation is a module with two functions:

    forward(rows)                                      -> RowLosses, RowStatistics
    backward(rows, statistics, coefficients, gradient) -> None, writes ``gradient``

``distillation_loss_triton`` runs on GPUs, ``distillation_loss_chunked`` everywhere else. Neither knows of
means, loss weights or autograd; ``distillation_loss`` holds those once for both.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class LossRows:
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


class RowLosses(NamedTuple):
    """Per-row losses, each [rows], not yet multiplied by T^2; zero in rows that do not count."""

    kl: Tensor
    soft_ce: Tensor
    hard_ce: Tensor


class RowStatistics(NamedTuple):
    """What the backward pass needs of a row to rebuild its three softmaxes, each [rows].

    With z the student's and u the teacher's logits:

        softmax(z / T) = exp((z - student_max) / T) / student_sum
        softmax(u / T) = exp((u - teacher_max) / T) / teacher_sum
        softmax(z)     = exp(z - student_max) / hard_sum

    Maximum and sum are kept apart, not added up to a logsumexp: at logits of 1e4 a float32 logsumexp is
    off by 5e-4, and so would be every probability; and the sum needs no further exponential.
    Undefined for softmaxes that the row does not take part in.
    """

    student_max: Tensor
    student_sum: Tensor
    teacher_max: Tensor
    teacher_sum: Tensor
    hard_sum: Tensor
