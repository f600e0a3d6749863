"""What the kernels are measured against: the original recipe in eager PyTorch, Liger, bare matrix products.

The losses are those of Sanh et al. 2019, arXiv 1910.01108, section 3, with their weights; rows are tokens.
Where a peer computes something else, its docstring says so.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from distilspeed.kernels.implementation.backend import use_triton

EAGER, COMPILE, LIGER = (frozenset({name}) for name in ("eager", "compile", "liger"))
PEERS = EAGER | COMPILE | LIGER

SOFT_WEIGHT = 5.0
HARD_WEIGHT = 2.0
IGNORE_INDEX = -100

# Once for a function, at its first call: that imports the compiler, which takes seconds.
compile_once = functools.cache(torch.compile)


def eager_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """5 T^2 KL(teacher || student) over all rows + 2 cross-entropy over the labelled ones; a scalar.

    Logits are [rows, vocabulary], labels [rows] int64.
    """
    soft = soft_loss(student_logits, teacher_logits, temperature)
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard_loss(student_logits, labels)


def distilbert_losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, attention_mask: Tensor, temperature: float
) -> Tensor:
    """The same as the original training code does it: the soft term's rows are selected entry by entry.

    attention_mask  [rows] bool, the rows of the soft term
    """
    student_rows = select_rows(student_logits, attention_mask)
    teacher_rows = select_rows(teacher_logits, attention_mask)
    soft = soft_loss(student_rows, teacher_rows, temperature)
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard_loss(student_logits, labels)


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    log_q = functional.log_softmax(student_logits / temperature, dim=-1)
    p = functional.softmax(teacher_logits / temperature, dim=-1)
    return functional.kl_div(log_q, p, reduction="batchmean") * temperature**2


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def eager_cosine(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Mean of 1 - cos over the rows of two [rows, hidden] tensors; a scalar."""
    same_direction = student_hidden.new_ones(student_hidden.shape[0])
    return functional.cosine_embedding_loss(student_hidden, teacher_hidden, same_direction)


def distilbert_cosine(student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The same as the original training code does it, over the rows of a [rows] bool mask."""
    return eager_cosine(
        select_rows(student_hidden, attention_mask), select_rows(teacher_hidden, attention_mask)
    )


def select_rows(values: Tensor, mask: Tensor) -> Tensor:
    """[rows, width] -> [selected rows, width], by a mask as large as ``values``."""
    return torch.masked_select(values, mask.unsqueeze(-1).expand_as(values)).view(-1, values.shape[-1])


def liger_logits(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Liger's KL divergence and cross-entropy kernels, the sum of :func:`eager_losses`; Triton only.

    The cross-entropy writes the gradient over ``student_logits``, which must not be a leaf.
    """
    if not use_triton(student_logits):
        raise RuntimeError("these kernels need a GPU")
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    log_q = functional.log_softmax(student_logits / temperature, dim=-1)
    p = functional.softmax(teacher_logits / temperature, dim=-1)
    soft: Tensor = LigerKLDivLossFunction.apply(log_q, p, "batchmean") * temperature**2
    hard, *_ = LigerCrossEntropyFunction.apply(student_logits, labels, None, IGNORE_INDEX)
    return SOFT_WEIGHT * soft + HARD_WEIGHT * hard


def liger_linear(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    temperature: float,
    compiled: bool,
) -> Tensor:
    """Liger's fused linear distillation loss, the one of its losses that is nearest to ours; PyTorch, any device.

    Its generalised Jensen-Shannon divergence with beta 0 is KL(teacher || student), and T^2 goes into its weight.
    It computes the divergence in all rows, as the others do, but then averages it over the labelled ones only.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_soft_loss=SOFT_WEIGHT * temperature**2,
        weight_hard_loss=HARD_WEIGHT,
        beta=0.0,
        ignore_index=IGNORE_INDEX,
        temperature=temperature,
        compiled=compiled,
    )
    value: Tensor = loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
    return value


def project_both(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, whole: [rows, hidden] x [vocabulary, hidden] -> [rows, vocabulary] each."""
    with torch.no_grad():
        teacher_logits = teacher_hidden @ teacher_weight.T
    return student_hidden @ student_weight.T, teacher_logits


def project_back(
    student_hidden: Tensor, student_weight: Tensor, logits_gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """From a gradient of the logits those of the student's hidden states and of its weight."""
    return logits_gradient @ student_weight, logits_gradient.T @ student_hidden
