"""The Triton kernel of the distillation loss: one program per row, each logit read once in each pass.

The loops over a row are in ``distillation_loss_lean``, for ordinary soft rows, and ``distillation_loss_guarded``, for
all others. A soft row whose sums come out as not finite, because a logit is -inf, is summed again by the guarded loop.

z: the student's logits of the row, u: the teacher's, y: the label, T: temperature. One pass over the row computes

    m_z, m_u, maxima          student_sum = sum_v exp((z_v - m_z) / T)
                              teacher_sum = sum_v w_v,  w_v = exp((u_v - m_u) / T)
    student_dot = sum_v w_v (z_v - m_z)
    gap_dot     = sum_v w_v ((u_v - m_u) - (z_v - m_z))
    hard_sum    = sum_v exp(z_v - m_z)                              (labelled rows only)

The row's losses, not yet multiplied by T^2, are

    soft_ce = log student_sum - student_dot / (T teacher_sum)
    kl      = log (student_sum / teacher_sum) + gap_dot / (T teacher_sum)
    hard_ce = log hard_sum - (z_y - m_z)

kl has its own sum, gap_dot, because soft_ce minus the teacher's entropy loses its precision once the student is
good.

Every thread keeps these seven numbers for its own columns, so that no thread waits for another before the end
of the row. There the threads' numbers are rescaled to the row's maxima and added up. When a tile or the row
raises a maximum, the sums are rescaled and the dots are moved to the new maximum (``move_sums``, ``move_dots``).

The gradient follows from maxima and sums:

    dL/dz_v = c_soft (q_v - p_v) [row is soft]  +  c_hard (softmax(z)_v - [v = y]) [row is labelled]

with c_soft = (dL/dkl + dL/dsoft_ce) T / soft_normalizer and c_hard = dL/dhard_ce / hard_normalizer. Both include
the loss scale. The gradient is computed in float32 and rounded to the logits' dtype once, at the store.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have their types in comments: Triton interprets annotations itself)

import triton
import triton.language as tl

from distilspeed.kernels.implementation.distillation_loss_guarded import (
    LOG2_E,
    guarded_gradient,
    guarded_sums,
)
from distilspeed.kernels.implementation.distillation_loss_lean import LIMIT, lean_gradient, lean_sums


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


@triton.jit(do_not_specialize=["num_rows"])
def distillation_loss_kernel(
    student_ptr,  # [rows, WIDTH] fp16, bf16 or fp32
    teacher_ptr,  # [rows, TEACHER_WIDTH] the same dtype
    gradient_ptr,  # [rows, WIDTH] the same dtype; may be student_ptr; any pointer without GRADIENT
    labels_ptr,  # [rows] int64; any pointer without HAS_LABELS
    soft_mask_ptr,  # [rows] bool; any pointer without HAS_MASK
    table_ptr,  # [8 or 3, rows] fp32
    coefficients_ptr,  # [2] fp32: c_soft, c_hard; any pointer without GRADIENT
    num_rows,
    student_stride,  # elements from one row to the next
    teacher_stride,
    gradient_stride,
    ignore_index,
    inverse_temperature,
    LOSSES: tl.constexpr,  # True: compute losses and statistics; False: read the statistics from the table
    GRADIENT: tl.constexpr,  # True: write the gradient; False: write the statistics into the table
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # every row begins at a multiple of this many elements
    GROUP: tl.constexpr,  # columns of a tile that one thread sums up
    NEIGHBOURS: tl.constexpr,  # True: a group's columns are adjacent and loaded together; False: LANES apart
    HAS_LABELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TEMPERATURE_IS_2: tl.constexpr,
    EVICTION: tl.constexpr,  # cache policy of the gradient's stores: "" or "evict_first"
):
    row = tl.program_id(0).to(tl.int64)  # row * stride may exceed 2^31
    is_soft, is_labelled, label = row_flags(
        row, labels_ptr, soft_mask_ptr, ignore_index, HAS_LABELS, HAS_MASK
    )
    student_row = student_ptr + tl.multiple_of(row * student_stride, ALIGNMENT)
    teacher_row = teacher_ptr + tl.multiple_of(row * teacher_stride, ALIGNMENT)
    scale = inverse_temperature * LOG2_E

    if LOSSES:
        # A kernel cannot raise, so a label outside the vocabulary makes the loss NaN. Read before anything is
        # written, because the gradient may overwrite the logits.
        in_vocabulary = (label >= 0) & (label < VOCAB_SIZE)
        label_logit = tl.load(student_row + label, mask=is_labelled & in_vocabulary, other=float("nan")).to(
            tl.float32
        )
        is_ordinary = tl.full((), False, tl.int1)
        student_max = tl.full((), 0.0, tl.float32)
        student_sum = tl.full((), 0.0, tl.float32)
        teacher_max = tl.full((), 0.0, tl.float32)
        teacher_sum = tl.full((), 0.0, tl.float32)
        hard_sum = tl.full((), 0.0, tl.float32)
        student_dot = tl.full((), 0.0, tl.float32)
        gap_dot = tl.full((), 0.0, tl.float32)
        student_error = tl.full((), 0.0, tl.float32)
        teacher_error = tl.full((), 0.0, tl.float32)
        hard_error = tl.full((), 0.0, tl.float32)
        if is_soft:
            (
                is_ordinary,
                student_max,
                student_sum,
                teacher_max,
                teacher_sum,
                hard_sum,
                student_dot,
                gap_dot,
                student_error,
                teacher_error,
                hard_error,
            ) = lean_sums(
                student_row,
                teacher_row,
                is_labelled,
                scale,
                VOCAB_SIZE,
                WIDTH,
                TEACHER_WIDTH,
                TILE,
                GROUP,
                NEIGHBOURS,
                TEMPERATURE_IS_2,
            )
        if not is_ordinary:
            student_max, student_sum, teacher_max, teacher_sum, hard_sum, student_dot, gap_dot = guarded_sums(
                student_row,
                teacher_row,
                is_soft,
                is_labelled,
                scale,
                VOCAB_SIZE,
                WIDTH,
                TEACHER_WIDTH,
                TILE,
                GROUP,
                NEIGHBOURS,
                TEMPERATURE_IS_2,
            )
            student_error = tl.full((), 0.0, tl.float32)
            teacher_error = tl.full((), 0.0, tl.float32)
            hard_error = tl.full((), 0.0, tl.float32)
        kl = tl.full((), 0.0, tl.float32)
        soft_ce = tl.full((), 0.0, tl.float32)
        hard_ce = tl.full((), 0.0, tl.float32)
        if is_soft:
            kl = tl.log(student_sum / teacher_sum) + gap_dot * inverse_temperature / teacher_sum
            soft_ce = tl.log(student_sum) - student_dot * inverse_temperature / teacher_sum
        if is_labelled:
            hard_ce = tl.log(hard_sum) + hard_error / LOG2_E - (label_logit - student_max)
        student_sum *= tl.exp2(student_error)
        teacher_sum *= tl.exp2(teacher_error)
        hard_sum *= tl.exp2(hard_error)
        tl.store(table_ptr + row, kl)
        tl.store(table_ptr + num_rows + row, soft_ce)
        tl.store(table_ptr + 2 * num_rows + row, hard_ce)
        if not GRADIENT:
            tl.store(table_ptr + 3 * num_rows + row, student_max)
            tl.store(table_ptr + 4 * num_rows + row, student_sum)
            tl.store(table_ptr + 5 * num_rows + row, teacher_max)
            tl.store(table_ptr + 6 * num_rows + row, teacher_sum)
            tl.store(table_ptr + 7 * num_rows + row, hard_sum)
    else:
        student_max = tl.load(table_ptr + 3 * num_rows + row)
        student_sum = tl.load(table_ptr + 4 * num_rows + row)
        teacher_max = tl.load(table_ptr + 5 * num_rows + row)
        teacher_sum = tl.load(table_ptr + 6 * num_rows + row)
        hard_sum = tl.load(table_ptr + 7 * num_rows + row)

    if GRADIENT:
        soft_coefficient = tl.load(coefficients_ptr)
        hard_coefficient = tl.load(coefficients_ptr + 1)
        # In 32 bits, because comparing 64 takes twice the instructions.
        target = tl.where((label >= 0) & (label < VOCAB_SIZE), label, -1).to(tl.int32)
        gradient_row = gradient_ptr + tl.multiple_of(row * gradient_stride, ALIGNMENT)
        student_factor = soft_coefficient / student_sum
        teacher_factor = soft_coefficient / teacher_sum
        hard_factor = hard_coefficient / hard_sum
        # The maxima of rows that are not soft are undefined.
        within_limit = (tl.abs(student_max * scale) <= LIMIT) & (tl.abs(teacher_max * scale) <= LIMIT)
        if is_soft & within_limit:
            lean_gradient(
                gradient_row,
                student_row,
                teacher_row,
                is_labelled,
                target,
                student_max,
                teacher_max,
                student_factor,
                teacher_factor,
                hard_factor,
                hard_coefficient,
                scale,
                VOCAB_SIZE,
                WIDTH,
                TEACHER_WIDTH,
                TILE,
                TEMPERATURE_IS_2,
                EVICTION,
            )
        else:
            guarded_gradient(
                gradient_row,
                student_row,
                teacher_row,
                is_soft,
                is_labelled,
                target,
                student_max,
                teacher_max,
                student_factor,
                teacher_factor,
                hard_factor,
                hard_coefficient,
                scale,
                VOCAB_SIZE,
                WIDTH,
                TEACHER_WIDTH,
                TILE,
                TEMPERATURE_IS_2,
            )
