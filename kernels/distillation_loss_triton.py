"""The distillation loss in Triton: one program per row, one pass over the vocabulary in each direction.

z: the student's logits of the row, u: the teacher's, y: its label, T: temperature.

Forward, over tiles of the vocabulary, each logit read once. With running maxima m_z, m_u and

    student_sum = sum_v exp((z_v - m_z) / T)          teacher_sum = sum_v w_v,  w_v = exp((u_v - m_u) / T)
    hard_sum    = sum_v exp(z_v - m_z)                (labelled rows only)
    student_dot = sum_v w_v (z_v - m_z)               gap_dot = sum_v w_v ((u_v - m_u) - (z_v - m_z))

the row's losses are (not yet times T^2)

    soft_ce = log student_sum - student_dot / (T teacher_sum)
    kl      = log (student_sum / teacher_sum) + gap_dot / (T teacher_sum)
    hard_ce = log hard_sum - (z_y - m_z)

When a tile raises a maximum, sums shrink by exp of the raise and the dots are moved to the new maximum.
kl has a sum of its own because soft_ce minus the teacher's entropy cancels once the student is good.

Backward, from the saved maxima and sums, one read of each logit and one write:

    dL/dz_v = c_soft (q_v - p_v) [row is soft]  +  c_hard (softmax(z)_v - [v = y]) [row is labelled]

with c_soft = (dL/dkl + dL/dsoft_ce) T / soft_normalizer and c_hard = dL/dhard_ce / hard_normalizer, in
float32 and with the loss scale in them; the result is rounded to the logits' dtype once, at the store.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have their types in comments: Triton would read annotations as its own)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distilspeed.kernels.backend import launch_device
from distilspeed.kernels.distillation_loss_rows import LossRows, RowLosses, RowStatistics

# Where running maxima start: low enough that every meaningful logit is above, and finite, so that
# tiles that are -inf throughout leave no inf - inf behind.
LOWEST = tl.constexpr(-1e30)


class LaunchConfig(NamedTuple):
    tile: int
    num_warps: int


def launch_config(vocab_size: int) -> LaunchConfig:
    """Tile width and warps for a vocabulary; both kernels, every dtype and device use the same.

    4096 logits over 8 warps, 16 a thread, take 48 to 96 registers and spill nowhere (fp16 and fp32 on sm_70,
    sm_80 and sm_90, Triton 3.9, November 2026), which leaves room for two programs per multiprocessor.
    8192 over 16 warps spill a little on sm_70.
    """
    tile = min(4096, triton.next_power_of_2(vocab_size))
    return LaunchConfig(tile, num_warps=max(1, tile // 512))


@triton.jit
def row_flags(row, labels_ptr, soft_mask_ptr, ignore_index, HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr):
    is_soft = tl.full((), True, tl.int1)
    is_labelled = tl.full((), False, tl.int1)
    label = tl.full((), -1, tl.int64)
    if HAS_MASK:
        is_soft = tl.load(soft_mask_ptr + row) != 0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
        is_labelled = label != ignore_index
    return is_soft, is_labelled, label


@triton.jit
def load_logits(row_ptr, columns, VOCAB_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    # Masked by the padded width: a mask by a vocabulary of odd size would narrow every load to one element.
    logits = tl.load(row_ptr + columns, mask=columns < WIDTH, other=float("-inf")).to(tl.float32)
    if VOCAB_SIZE < WIDTH:
        logits = tl.where(columns < VOCAB_SIZE, logits, float("-inf"))
    return logits


@triton.jit
def forward_kernel(
    student_ptr,  # [rows, WIDTH] fp16, bf16 or fp32
    teacher_ptr,  # [rows, WIDTH] the same dtype
    labels_ptr,  # [rows] int64; any pointer without HAS_LABELS
    soft_mask_ptr,  # [rows] bool; any pointer without HAS_MASK
    kl_ptr,  # [rows] fp32, like all that follow
    soft_ce_ptr,
    hard_ce_ptr,
    student_max_ptr,
    student_sum_ptr,
    teacher_max_ptr,
    teacher_sum_ptr,
    hard_sum_ptr,
    student_stride,  # elements from one row to the next
    teacher_stride,
    ignore_index,
    inverse_temperature,
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    is_soft, is_labelled, label = row_flags(
        row, labels_ptr, soft_mask_ptr, ignore_index, HAS_LABELS, HAS_MASK
    )
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride

    student_max = tl.full((), LOWEST, tl.float32)
    teacher_max = tl.full((), LOWEST, tl.float32)
    student_sum = tl.full((), 0.0, tl.float32)
    teacher_sum = tl.full((), 0.0, tl.float32)
    hard_sum = tl.full((), 0.0, tl.float32)
    student_dot = tl.full((), 0.0, tl.float32)
    gap_dot = tl.full((), 0.0, tl.float32)

    if is_soft | is_labelled:
        for start in range(0, VOCAB_SIZE, TILE):
            columns = start + tl.arange(0, TILE)
            student = load_logits(student_row, columns, VOCAB_SIZE, WIDTH)
            new_student_max = tl.maximum(student_max, tl.max(student, 0))
            student_raise = student_max - new_student_max
            student -= new_student_max
            if is_labelled:
                hard_sum = hard_sum * tl.exp(student_raise) + tl.sum(tl.exp(student), 0)
            if is_soft:
                student_sum *= tl.exp(student_raise * inverse_temperature)
                student_sum += tl.sum(tl.exp(student * inverse_temperature), 0)

                teacher = load_logits(teacher_row, columns, VOCAB_SIZE, WIDTH)
                new_teacher_max = tl.maximum(teacher_max, tl.max(teacher, 0))
                teacher_raise = teacher_max - new_teacher_max
                teacher -= new_teacher_max
                weights = tl.exp(teacher * inverse_temperature)
                shrink = tl.exp(teacher_raise * inverse_temperature)
                # A class the teacher rules out contributes 0 even where the student's logit is -inf.
                counts = weights > 0
                student_terms = tl.sum(tl.where(counts, weights * student, 0.0), 0)
                gap_terms = tl.sum(tl.where(counts, weights * (teacher - student), 0.0), 0)
                student_dot += teacher_sum * student_raise
                gap_dot += teacher_sum * (teacher_raise - student_raise)
                student_dot = tl.where(shrink > 0, student_dot * shrink, 0.0) + student_terms
                gap_dot = tl.where(shrink > 0, gap_dot * shrink, 0.0) + gap_terms
                teacher_sum = teacher_sum * shrink + tl.sum(weights, 0)
                teacher_max = new_teacher_max
            student_max = new_student_max

    kl = tl.full((), 0.0, tl.float32)
    soft_ce = tl.full((), 0.0, tl.float32)
    hard_ce = tl.full((), 0.0, tl.float32)
    if is_soft:
        kl = tl.log(student_sum / teacher_sum) + gap_dot * inverse_temperature / teacher_sum
        soft_ce = tl.log(student_sum) - student_dot * inverse_temperature / teacher_sum
    if is_labelled:
        # No row can stop the others to complain about its label, so it turns the loss into NaN.
        in_vocabulary = (label >= 0) & (label < VOCAB_SIZE)
        label_logit = tl.load(student_row + label, mask=in_vocabulary, other=float("nan")).to(tl.float32)
        hard_ce = tl.log(hard_sum) - (label_logit - student_max)

    tl.store(kl_ptr + row, kl)
    tl.store(soft_ce_ptr + row, soft_ce)
    tl.store(hard_ce_ptr + row, hard_ce)
    tl.store(student_max_ptr + row, student_max)
    tl.store(student_sum_ptr + row, student_sum)
    tl.store(teacher_max_ptr + row, teacher_max)
    tl.store(teacher_sum_ptr + row, teacher_sum)
    tl.store(hard_sum_ptr + row, hard_sum)


@triton.jit
def backward_kernel(
    student_ptr,  # [rows, WIDTH] fp16, bf16 or fp32
    teacher_ptr,  # [rows, WIDTH] the same dtype
    gradient_ptr,  # [rows, WIDTH] the same dtype; may be student_ptr
    labels_ptr,  # [rows] int64; any pointer without HAS_LABELS
    soft_mask_ptr,  # [rows] bool; any pointer without HAS_MASK
    coefficients_ptr,  # [2] fp32: c_soft, c_hard
    student_max_ptr,  # [rows] fp32, like all that follow
    student_sum_ptr,
    teacher_max_ptr,
    teacher_sum_ptr,
    hard_sum_ptr,
    student_stride,  # elements from one row to the next
    teacher_stride,
    gradient_stride,
    ignore_index,
    inverse_temperature,
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    is_soft, is_labelled, label = row_flags(
        row, labels_ptr, soft_mask_ptr, ignore_index, HAS_LABELS, HAS_MASK
    )
    student_row = student_ptr + row * student_stride
    teacher_row = teacher_ptr + row * teacher_stride
    gradient_row = gradient_ptr + row * gradient_stride

    soft_coefficient = tl.load(coefficients_ptr)
    hard_coefficient = tl.load(coefficients_ptr + 1)
    student_max = tl.load(student_max_ptr + row)
    teacher_max = tl.load(teacher_max_ptr + row)
    student_factor = soft_coefficient / tl.load(student_sum_ptr + row)
    teacher_factor = soft_coefficient / tl.load(teacher_sum_ptr + row)
    hard_factor = hard_coefficient / tl.load(hard_sum_ptr + row)

    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        gradient = tl.zeros([TILE], tl.float32)
        if is_soft | is_labelled:
            student = load_logits(student_row, columns, VOCAB_SIZE, WIDTH) - student_max
            if is_soft:
                teacher = load_logits(teacher_row, columns, VOCAB_SIZE, WIDTH) - teacher_max
                gradient = student_factor * tl.exp(student * inverse_temperature)
                gradient -= teacher_factor * tl.exp(teacher * inverse_temperature)
            if is_labelled:
                gradient += hard_factor * tl.exp(student)
                is_target = (columns == label) & (columns < VOCAB_SIZE)
                gradient = tl.where(is_target, gradient - hard_coefficient, gradient)
        tl.store(gradient_row + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=columns < WIDTH)


def forward(rows: LossRows) -> tuple[RowLosses, RowStatistics]:
    """Per-row losses and softmax statistics, float32."""
    new_column = rows.student_logits.new_empty
    losses = RowLosses(*(new_column(rows.num_rows, dtype=torch.float32) for _ in RowLosses._fields))
    statistics = RowStatistics(
        *(new_column(rows.num_rows, dtype=torch.float32) for _ in RowStatistics._fields)
    )
    config = launch_config(rows.vocab_size)
    if rows.num_rows > 0:
        with launch_device(rows.student_logits):
            forward_kernel[(rows.num_rows,)](
                rows.student_logits,
                rows.teacher_logits,
                *row_flag_pointers(rows),
                *losses,
                *statistics,
                rows.student_logits.stride(0),
                rows.teacher_logits.stride(0),
                rows.ignore_index,
                1 / rows.temperature,
                rows.vocab_size,
                rows.student_logits.shape[1],
                config.tile,
                rows.labels is not None,
                rows.soft_mask is not None,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
            )
    return losses, statistics


def backward(rows: LossRows, statistics: RowStatistics, coefficients: Tensor, gradient: Tensor) -> None:
    """Write the gradient with respect to the student's logits.

    coefficients  [2] float32: c_soft and c_hard
    gradient      [rows, width] in the logits' dtype; may be ``rows.student_logits`` itself
    """
    config = launch_config(rows.vocab_size)
    if rows.num_rows > 0:
        with launch_device(rows.student_logits):
            backward_kernel[(rows.num_rows,)](
                rows.student_logits,
                rows.teacher_logits,
                gradient,
                *row_flag_pointers(rows),
                coefficients,
                *statistics,
                rows.student_logits.stride(0),
                rows.teacher_logits.stride(0),
                gradient.stride(0),
                rows.ignore_index,
                1 / rows.temperature,
                rows.vocab_size,
                rows.student_logits.shape[1],
                config.tile,
                rows.labels is not None,
                rows.soft_mask is not None,
                num_warps=config.num_warps,
                enable_fp_fusion=True,
            )


def row_flag_pointers(rows: LossRows) -> tuple[Tensor, Tensor]:
    """Labels and soft mask, with a stand-in that is never read where there are none."""
    labels = rows.student_logits if rows.labels is None else rows.labels
    soft_mask = rows.student_logits if rows.soft_mask is None else rows.soft_mask
    return labels, soft_mask
