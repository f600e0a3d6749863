"""Loops over a soft row with few instructions per logit, for ordinary rows.

A row is ordinary if its dots are finite and its maxima times log2(e) / T at most ``LIMIT``. For all other rows
``distillation_loss_kernel`` uses the loops of ``distillation_loss_guarded``.

Whole tiles are read without masks; one masked tile follows. An exponent is one fused multiply-add in units of log2.
With s = log2(e) / T:

    exp((z - m_z) / T) = 2^(s z - M) 2^r,    M = s m_z rounded to float32,    r = M - s m_z

The factor 2^r is the same for all columns and is applied once per row, to the sums that the gradient uses, so that
exponents are as accurate at logits of 1e4 as at logits of 1. The running maxima are kept as M and not as m_z: the
compiler would fuse the product s m_z into the difference of two maxima, which would then not be the difference of the
two M in the exponents.

The gradient's factors (coefficient / sum) are not folded into the exponents' offsets as logarithms. That would save
one instruction of 11, but the rounding of a sum of maximum and logarithm is an error of the gradient: 1e-4 at logits
of 1e4.
"""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have their types in comments: Triton interprets annotations itself)

import triton
import triton.language as tl

from distilspeed.kernels.implementation.distillation_loss_guarded import LOG2_E, LOWEST, tile_offsets

LIMIT = tl.constexpr(2.0**24)  # float32 represents every integer up to this one


@triton.jit
def lean_sums(
    student_row,
    teacher_row,
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
    """Return True if the row is ordinary, what ``guarded_sums`` returns, and r of the three sums.

    Sums and dots are relative to the rounded maxima M. The losses do not depend on what they are relative to, as long
    as it is the same; correcting the sums first would round them once more.
    """
    LANES: tl.constexpr = TILE // GROUP
    AXIS: tl.constexpr = 1 if NEIGHBOURS else 0
    WHOLE: tl.constexpr = VOCAB_SIZE // TILE * TILE
    offsets = tile_offsets(TILE, GROUP, NEIGHBOURS)
    student_max = tl.full([LANES], LOWEST, tl.float32)
    teacher_max = tl.full([LANES], LOWEST, tl.float32)
    hard_max = tl.full([LANES], LOWEST, tl.float32)
    student_sum = tl.zeros([LANES], tl.float32)
    teacher_sum = tl.zeros([LANES], tl.float32)
    hard_sum = tl.zeros([LANES], tl.float32)
    student_dot = tl.zeros([LANES], tl.float32)
    gap_dot = tl.zeros([LANES], tl.float32)

    for start in range(0, WHOLE, TILE):
        columns = start + offsets
        student_max, teacher_max, hard_max, student_sum, teacher_sum, hard_sum, student_dot, gap_dot = (
            add_tile(
                tl.load(student_row + columns).to(tl.float32),
                tl.load(teacher_row + columns).to(tl.float32),
                columns,
                student_max,
                teacher_max,
                hard_max,
                student_sum,
                teacher_sum,
                hard_sum,
                student_dot,
                gap_dot,
                is_labelled,
                scale,
                VOCAB_SIZE,
                AXIS,
                False,
                TEMPERATURE_IS_2,
            )
        )
    if WHOLE < VOCAB_SIZE:
        columns = WHOLE + offsets
        student_max, teacher_max, hard_max, student_sum, teacher_sum, hard_sum, student_dot, gap_dot = (
            add_tile(
                tl.load(student_row + columns, mask=columns < WIDTH, other=0.0).to(tl.float32),
                tl.load(teacher_row + columns, mask=columns < TEACHER_WIDTH, other=0.0).to(tl.float32),
                columns,
                student_max,
                teacher_max,
                hard_max,
                student_sum,
                teacher_sum,
                hard_sum,
                student_dot,
                gap_dot,
                is_labelled,
                scale,
                VOCAB_SIZE,
                AXIS,
                True,
                TEMPERATURE_IS_2,
            )
        )

    row_student_max, row_teacher_max = tl.reduce((student_max, teacher_max), 0, larger_of_both)
    student_sum, teacher_sum, student_dot, gap_dot = move_sums(
        student_sum,
        teacher_sum,
        student_dot,
        gap_dot,
        student_max - row_student_max,
        teacher_max - row_teacher_max,
    )
    student_sum = tl.sum(student_sum, 0)
    teacher_sum = tl.sum(teacher_sum, 0)
    student_dot = tl.sum(student_dot, 0)
    gap_dot = tl.sum(gap_dot, 0)
    is_ordinary = (tl.abs(row_student_max) <= LIMIT) & (tl.abs(row_teacher_max) <= LIMIT)
    is_ordinary = is_ordinary & (tl.abs(student_dot) < float("inf")) & (tl.abs(gap_dot) < float("inf"))
    student_logit, student_error = unscale(row_student_max, scale)
    teacher_logit, teacher_error = unscale(row_teacher_max, scale)
    row_hard_sum = tl.zeros_like(student_sum)
    hard_error = tl.zeros_like(student_sum)
    if is_labelled:
        if TEMPERATURE_IS_2:
            hard_max = 2 * student_max
        row_hard_max = tl.max(hard_max, 0)
        row_hard_sum = tl.sum(hard_sum * tl.exp2(hard_max - row_hard_max), 0)
        hard_error = tl.fma(-student_logit, LOG2_E, row_hard_max)
    return (
        is_ordinary,
        student_logit,
        student_sum,
        teacher_logit,
        teacher_sum,
        row_hard_sum,
        student_dot / scale,
        gap_dot / scale,
        student_error,
        teacher_error,
        hard_error,
    )


@triton.jit
def larger_of_both(a, b, other_a, other_b):
    return tl.maximum(a, other_a), tl.maximum(b, other_b)


@triton.jit
def unscale(maximum, scale):
    """Return a logit z, and maximum - scale z: 0 but for the rounding errors of maximum and z."""
    logit = maximum / scale
    return logit, tl.fma(-logit, scale, maximum)


@triton.jit
def add_tile(
    student,
    teacher,
    columns,
    student_max,
    teacher_max,
    hard_max,
    student_sum,
    teacher_sum,
    hard_sum,
    student_dot,
    gap_dot,
    is_labelled,
    scale,
    VOCAB_SIZE: tl.constexpr,
    AXIS: tl.constexpr,
    MASKED: tl.constexpr,  # columns from VOCAB_SIZE on do not count
    TEMPERATURE_IS_2: tl.constexpr,
):
    real = columns < VOCAB_SIZE
    student_logits = tl.where(real, student, float("-inf")) if MASKED else student
    teacher_logits = tl.where(real, teacher, float("-inf")) if MASKED else teacher
    student_top = tl.max(student_logits, AXIS)
    new_student_max = tl.maximum(student_max, student_top * scale)
    new_teacher_max = tl.maximum(teacher_max, tl.max(teacher_logits, AXIS) * scale)
    student_raise = student_max - new_student_max
    student_powers = tl.fma(student, scale, -tl.expand_dims(new_student_max, AXIS))
    teacher_powers = tl.fma(teacher, scale, -tl.expand_dims(new_teacher_max, AXIS))
    if MASKED:
        # Finite, because the dots multiply it by a weight of 0.
        student_powers = tl.where(real, student_powers, LOWEST)
        teacher_powers = tl.where(real, teacher_powers, LOWEST)
    student_weights = tl.exp2(student_powers)
    teacher_weights = tl.exp2(teacher_powers)
    student_sum, teacher_sum, student_dot, gap_dot = move_sums(
        student_sum, teacher_sum, student_dot, gap_dot, student_raise, teacher_max - new_teacher_max
    )
    student_sum += tl.sum(student_weights, AXIS)
    teacher_sum += tl.sum(teacher_weights, AXIS)
    student_dot += tl.sum(teacher_weights * student_powers, AXIS)
    gap_dot += tl.sum(teacher_weights * (teacher_powers - student_powers), AXIS)
    if is_labelled:
        if TEMPERATURE_IS_2:
            # exp(z) = exp(z / 2)^2
            hard = student_weights * student_weights
            hard_raise = 2 * student_raise
        else:
            new_hard_max = tl.maximum(hard_max, student_top * LOG2_E)
            hard_powers = tl.fma(student, LOG2_E, -tl.expand_dims(new_hard_max, AXIS))
            hard = tl.exp2(tl.where(real, hard_powers, LOWEST) if MASKED else hard_powers)
            hard_raise = hard_max - new_hard_max
            hard_max = new_hard_max
        hard_sum = hard_sum * tl.exp2(hard_raise) + tl.sum(hard, AXIS)
    return (
        new_student_max,
        new_teacher_max,
        hard_max,
        student_sum,
        teacher_sum,
        hard_sum,
        student_dot,
        gap_dot,
    )


@triton.jit
def move_sums(student_sum, teacher_sum, student_dot, gap_dot, student_raise, teacher_raise):
    """Move sums and dots to new maxima; raises are old minus new maximum, at most 0, in units of log2."""
    shrink = tl.exp2(teacher_raise)
    student_dot = (student_dot + teacher_sum * student_raise) * shrink
    gap_dot = (gap_dot + teacher_sum * (teacher_raise - student_raise)) * shrink
    return student_sum * tl.exp2(student_raise), teacher_sum * shrink, student_dot, gap_dot


@triton.jit
def lean_gradient(
    gradient_row,
    student_row,
    teacher_row,
    is_labelled,
    target,  # the target, -1 if it is outside the vocabulary
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
    EVICTION: tl.constexpr,  # policy of the gradient's stores
):
    WHOLE: tl.constexpr = VOCAB_SIZE // TILE * TILE
    student_offset = student_max * scale
    teacher_offset = teacher_max * scale
    hard_offset = student_max * LOG2_E
    student_factor *= tl.exp2(tl.fma(-student_max, scale, student_offset))
    teacher_factor *= tl.exp2(tl.fma(-teacher_max, scale, teacher_offset))
    hard_factor *= tl.exp2(tl.fma(-student_max, LOG2_E, hard_offset))
    # From the end of the row: after a forward pass in the same launch the cache still holds it.
    for start in range(WHOLE, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        student = tl.load(student_row + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_row + columns, mask=columns < TEACHER_WIDTH, other=0.0).to(tl.float32)
        gradient = tile_gradient(
            student,
            teacher,
            is_labelled,
            target - start,
            student_offset,
            teacher_offset,
            hard_offset,
            student_factor,
            teacher_factor,
            hard_factor,
            hard_coefficient,
            scale,
            TILE,
            TEMPERATURE_IS_2,
        )
        gradient = tl.where(columns < VOCAB_SIZE, gradient, 0.0).to(gradient_row.dtype.element_ty)
        tl.store(gradient_row + columns, gradient, mask=columns < WIDTH, eviction_policy=EVICTION)
    for before_last in range(0, WHOLE, TILE):
        start = WHOLE - TILE - before_last
        columns = start + tl.arange(0, TILE)
        student = tl.load(student_row + columns).to(tl.float32)
        teacher = tl.load(teacher_row + columns).to(tl.float32)
        gradient = tile_gradient(
            student,
            teacher,
            is_labelled,
            target - start,
            student_offset,
            teacher_offset,
            hard_offset,
            student_factor,
            teacher_factor,
            hard_factor,
            hard_coefficient,
            scale,
            TILE,
            TEMPERATURE_IS_2,
        )
        gradient = gradient.to(gradient_row.dtype.element_ty)
        tl.store(gradient_row + columns, gradient, eviction_policy=EVICTION)


@triton.jit
def tile_gradient(
    student,
    teacher,
    is_labelled,
    position,  # of the label in the tile
    student_offset,
    teacher_offset,
    hard_offset,
    student_factor,
    teacher_factor,
    hard_factor,
    hard_coefficient,
    scale,
    TILE: tl.constexpr,
    TEMPERATURE_IS_2: tl.constexpr,
):
    weights = tl.exp2(tl.fma(student, scale, -student_offset))
    teacher_weights = tl.exp2(tl.fma(teacher, scale, -teacher_offset))
    gradient = student_factor * weights - teacher_factor * teacher_weights
    if is_labelled:
        # exp(z) = exp(z / 2)^2
        hard = weights * weights if TEMPERATURE_IS_2 else tl.exp2(tl.fma(student, LOG2_E, -hard_offset))
        gradient += hard_factor * hard
        if (position >= 0) & (position < TILE):
            gradient = tl.where(tl.arange(0, TILE) == position, gradient - hard_coefficient, gradient)
    return gradient
