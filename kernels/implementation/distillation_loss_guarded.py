"""Loops over any row: logits may be -inf or too large for ``distillation_loss_lean``, and rows need not be soft.

The formulas are in ``distillation_loss_kernel``.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have their types in comments: Triton interprets annotations itself)

import math

import triton
import triton.language as tl

# Initial value of the running maxima: below every meaningful logit, and finite, so that a thread whose columns are
# all -inf does not compute inf - inf.
LOWEST = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(math.log2(math.e))  # the hardware has exp2; exp is exp2 and a multiplication


@triton.jit
def tile_offsets(TILE: tl.constexpr, GROUP: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Columns of a tile as a matrix of LANES groups; each group belongs to one thread."""
    LANES: tl.constexpr = TILE // GROUP
    if NEIGHBOURS:
        offsets = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        offsets = tl.arange(0, GROUP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return offsets


@triton.jit
def load_logits(row_ptr, columns, mask, VOCAB_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    # The mask uses the padded width: masking by an odd vocabulary size would narrow every load to one element.
    logits = tl.load(row_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if VOCAB_SIZE < WIDTH:
        logits = tl.where(columns < VOCAB_SIZE, logits, float("-inf"))
    return logits


@triton.jit
def guarded_sums(
    student_row,
    teacher_row,
    is_soft,
    is_labelled,
    scale,  # log2(e) / T
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    TEMPERATURE_IS_2: tl.constexpr,
):
    LANES: tl.constexpr = TILE // GROUP
    AXIS: tl.constexpr = 1 if NEIGHBOURS else 0
    offsets = tile_offsets(TILE, GROUP, NEIGHBOURS)
    student_max = tl.full([LANES], LOWEST, tl.float32)
    teacher_max = tl.full([LANES], LOWEST, tl.float32)
    student_sum = tl.zeros([LANES], tl.float32)
    teacher_sum = tl.zeros([LANES], tl.float32)
    hard_sum = tl.zeros([LANES], tl.float32)
    student_dot = tl.zeros([LANES], tl.float32)
    gap_dot = tl.zeros([LANES], tl.float32)

    # Rows that are neither soft nor labelled are not read.
    for start in range(0, tl.where(is_soft | is_labelled, VOCAB_SIZE, 0), TILE):
        columns = start + offsets
        student = load_logits(student_row, columns, columns < WIDTH, VOCAB_SIZE, WIDTH)
        new_student_max = tl.maximum(student_max, tl.max(student, AXIS))
        student_raise = student_max - new_student_max
        student_max = new_student_max
        student -= tl.expand_dims(student_max, AXIS)
        student_weights = tl.exp2(student * scale)
        student_sum = student_sum * tl.exp2(student_raise * scale) + tl.sum(student_weights, AXIS)
        if is_labelled:
            # exp(z) = exp(z / 2)^2
            hard = student_weights * student_weights if TEMPERATURE_IS_2 else tl.exp2(student * LOG2_E)
            hard_sum = hard_sum * tl.exp2(student_raise * LOG2_E) + tl.sum(hard, AXIS)
        if is_soft:
            teacher = load_logits(teacher_row, columns, columns < TEACHER_WIDTH, VOCAB_SIZE, TEACHER_WIDTH)
            new_teacher_max = tl.maximum(teacher_max, tl.max(teacher, AXIS))
            teacher_raise = teacher_max - new_teacher_max
            teacher_max = new_teacher_max
            teacher -= tl.expand_dims(teacher_max, AXIS)
            teacher_weights = tl.exp2(teacher * scale)
            # A class of teacher probability 0 contributes 0 even if the student's logit is -inf.
            counts = teacher_weights > 0
            student_terms = tl.sum(tl.where(counts, teacher_weights * student, 0.0), AXIS)
            gap_terms = tl.sum(tl.where(counts, teacher_weights * (teacher - student), 0.0), AXIS)
            student_dot, gap_dot, teacher_sum = move_dots(
                student_dot, gap_dot, teacher_sum, student_raise, teacher_raise, scale
            )
            student_dot += student_terms
            gap_dot += gap_terms
            teacher_sum += tl.sum(teacher_weights, AXIS)

    row_student_max = tl.max(student_max, 0)
    row_teacher_max = tl.max(teacher_max, 0)
    student_raise = student_max - row_student_max
    student_sum = tl.sum(student_sum * tl.exp2(student_raise * scale), 0)
    hard_sum = tl.sum(hard_sum * tl.exp2(student_raise * LOG2_E), 0)
    student_dot, gap_dot, teacher_sum = move_dots(
        student_dot, gap_dot, teacher_sum, student_raise, teacher_max - row_teacher_max, scale
    )
    return (
        row_student_max,
        student_sum,
        row_teacher_max,
        tl.sum(teacher_sum, 0),
        hard_sum,
        tl.sum(student_dot, 0),
        tl.sum(gap_dot, 0),
    )


@triton.jit
def move_dots(student_dot, gap_dot, teacher_sum, student_raise, teacher_raise, scale):
    """Move the dots and the teacher's sum to new maxima; raises are old minus new maximum, at most 0."""
    shrink = tl.exp2(teacher_raise * scale)
    student_dot += teacher_sum * student_raise
    gap_dot += teacher_sum * (teacher_raise - student_raise)
    student_dot = tl.where(shrink > 0, student_dot * shrink, 0.0)
    gap_dot = tl.where(shrink > 0, gap_dot * shrink, 0.0)
    return student_dot, gap_dot, teacher_sum * shrink


@triton.jit
def guarded_gradient(
    gradient_row,
    student_row,
    teacher_row,
    is_soft,
    is_labelled,
    target,  # the label, -1 if it is outside the vocabulary
    student_max,
    teacher_max,
    student_factor,  # factors of the exponentials: coefficient / sum
    teacher_factor,
    hard_factor,
    hard_coefficient,
    scale,  # log2(e) / T
    VOCAB_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TEMPERATURE_IS_2: tl.constexpr,
):
    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        gradient = tl.zeros([TILE], tl.float32)
        if is_soft | is_labelled:
            student = load_logits(student_row, columns, columns < WIDTH, VOCAB_SIZE, WIDTH) - student_max
            weights = tl.exp2(student * scale)
            if is_soft:
                teacher = load_logits(
                    teacher_row, columns, columns < TEACHER_WIDTH, VOCAB_SIZE, TEACHER_WIDTH
                )
                teacher_weights = tl.exp2((teacher - teacher_max) * scale)
                gradient = student_factor * weights - teacher_factor * teacher_weights
            if is_labelled:
                hard = weights * weights if TEMPERATURE_IS_2 else tl.exp2(student * LOG2_E)
                gradient += hard_factor * hard
                gradient = tl.where(columns == target, gradient - hard_coefficient, gradient)
        tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=columns < WIDTH)
