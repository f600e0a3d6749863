"""The Triton kernel of the distillation loss: one program per row, each logit read once in each pass.

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
raises a maximum, the sums are rescaled and the dots are moved to the new maximum (``move_dots``).

The gradient follows from maxima and sums:

    dL/dz_v = c_soft (q_v - p_v) [row is soft]  +  c_hard (softmax(z)_v - [v = y]) [row is labelled]

with c_soft = (dL/dkl + dL/dsoft_ce) T / soft_normalizer and c_hard = dL/dhard_ce / hard_normalizer. Both include
the loss scale. The gradient is computed in float32 and rounded to the logits' dtype once, at the store.

Online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867.
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
def load_logits(row_ptr, columns, mask, VOCAB_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    # The mask uses the padded width: masking by an odd vocabulary size would narrow every load to one element.
    logits = tl.load(row_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if VOCAB_SIZE < WIDTH:
        logits = tl.where(columns < VOCAB_SIZE, logits, float("-inf"))
    return logits


@triton.jit
def row_sums(
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
    # A tile is a matrix of LANES groups; each group belongs to one thread and has its own seven numbers.
    LANES: tl.constexpr = TILE // GROUP
    AXIS: tl.constexpr = 1 if NEIGHBOURS else 0
    if NEIGHBOURS:
        offsets = tl.arange(0, LANES)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        offsets = tl.arange(0, GROUP)[:, None] * LANES + tl.arange(0, LANES)[None, :]
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
        teacher_mask = tl.where(is_soft, columns < TEACHER_WIDTH, False)
        teacher = load_logits(teacher_row, columns, teacher_mask, VOCAB_SIZE, TEACHER_WIDTH)
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
def write_gradient(
    gradient_row,
    student_row,
    teacher_row,
    is_soft,
    is_labelled,
    label,
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
    LAST: tl.constexpr = (WIDTH - 1) // TILE * TILE
    for before_last in range(0, WIDTH, TILE):
        # From the end of the row: after a forward pass in the same launch the cache still holds it.
        columns = LAST - before_last + tl.arange(0, TILE)
        gradient = tl.zeros([TILE], tl.float32)
        if is_soft | is_labelled:
            student = load_logits(student_row, columns, columns < WIDTH, VOCAB_SIZE, WIDTH) - student_max
            teacher_mask = tl.where(is_soft, columns < TEACHER_WIDTH, False)
            teacher = load_logits(teacher_row, columns, teacher_mask, VOCAB_SIZE, TEACHER_WIDTH) - teacher_max
            weights = tl.exp2(student * scale)
            if is_soft:
                gradient = student_factor * weights - teacher_factor * tl.exp2(teacher * scale)
            if is_labelled:
                hard = weights * weights if TEMPERATURE_IS_2 else tl.exp2(student * LOG2_E)
                gradient += hard_factor * hard
                is_target = (columns == label) & (columns < VOCAB_SIZE)
                gradient = tl.where(is_target, gradient - hard_coefficient, gradient)
        tl.store(gradient_row + columns, gradient.to(gradient_row.dtype.element_ty), mask=columns < WIDTH)


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
        sums = row_sums(
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
        student_max, student_sum, teacher_max, teacher_sum, hard_sum, student_dot, gap_dot = sums
        kl = tl.full((), 0.0, tl.float32)
        soft_ce = tl.full((), 0.0, tl.float32)
        hard_ce = tl.full((), 0.0, tl.float32)
        if is_soft:
            kl = tl.log(student_sum / teacher_sum) + gap_dot * inverse_temperature / teacher_sum
            soft_ce = tl.log(student_sum) - student_dot * inverse_temperature / teacher_sum
        if is_labelled:
            hard_ce = tl.log(hard_sum) - (label_logit - student_max)
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
        write_gradient(
            gradient_ptr + tl.multiple_of(row * gradient_stride, ALIGNMENT),
            student_row,
            teacher_row,
            is_soft,
            is_labelled,
            label,
            student_max,
            teacher_max,
            soft_coefficient / student_sum,
            soft_coefficient / teacher_sum,
            hard_coefficient / hard_sum,
            hard_coefficient,
            scale,
            VOCAB_SIZE,
            WIDTH,
            TEACHER_WIDTH,
            TILE,
            TEMPERATURE_IS_2,
        )
