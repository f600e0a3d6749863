"""Estimate the memory of one rank's tensors from shapes.

    weights, gradients, optimiser states   by ZeRO stage (Rajbhandari et al. 2020, section 3)
    reduction buckets                      DeepSpeed's, allocated in full
    activations                            tensors that the student keeps for its backward pass, and both models' logits

The peak of a step is at the end of the student's forward pass, when activations, logits and the gradients of earlier
micro-steps are in memory. tests/launch/test_memory.py compares the estimates with measured peaks.
"""

from dataclasses import dataclass

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.families.shape import ModelShape
from distilspeed.trainer.models.attention import LONGEST_EAGER_ROW

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# AdamW keeps two float32 moments; mixed precision and ZeRO add float32 master weights.
ADAM_BYTES_PER_PARAMETER = 8
MASTER_BYTES_PER_PARAMETER = 4
# Tensors of [tokens, hidden size] kept for the backward pass. In each layer these are the inputs of matrix products,
# norms and activation; feed-forward ones have [tokens, intermediate size]. The others are of embeddings and MLM head.
ATTENTION_ACTIVATIONS, FEED_FORWARD_ACTIVATIONS, OTHER_ACTIVATIONS = 9, 2, 6
# The same with rotary positions, which keep queries and keys twice, and with a gate.
ROTARY_ACTIVATIONS, GATED_ACTIVATIONS = 10, 4
# The same with GPT-2's activation, which is several operators.
GELU_NEW_ACTIVATIONS = 5
# The bool mask, [length] per token, is made once. SDPA converts it to numbers in each layer, which keeps them.
MASK_BYTES = 1
# What a CPU keeps instead, in bytes per attention probability ([heads, length] per token). SDPA with dropout: the
# probabilities, mask and product, and in half precision a copy for the matrix product. EAGER, which is for half
# precision: the probabilities, and with dropout mask and product; with rotary positions a float32 softmax, too.
SDPA_WITH_DROPOUT = {4: 3 * 4, 2: 4 * 4}
EAGER_PROBABILITIES, EAGER_DROPOUT, EAGER_ROTARY = 2, 2 * 2, 4
# Without a teacher: logits and gradient. With one: the logits of both models; the gradient is written over the
# student's.
MLM_LOGITS = 2
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes of tensors on one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer_states: int
    buckets: int
    teacher: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    batch: BatchEquation,
    seq_length: int,
    config: DeepSpeedConfig,
    *,
    teacher_zero3: bool = False,
    head_share: float = 1.0,
    on_cpu: bool = False,
    attention_dropout: float = 0.0,
) -> MemoryPlan:
    """Estimate the memory of one rank from shapes, ZeRO stage, offload and micro-batch.

    Args:
        config: gives ZeRO stage, offload and precision.
        head_share: the fraction of tokens that have logits.
        on_cpu: on a CPU, attention keeps its probabilities if it has dropout or runs in half precision.
        attention_dropout: the student's dropout probability in attention.
    """
    width = BYTES[config.precision]

    def share(size: int, from_stage: int) -> int:
        return size // (batch.world_size if config.zero_stage >= from_stage else 1)

    tokens = batch.micro_batch_size * seq_length
    probability = _bytes_per_probability(student, seq_length, width, attention_dropout > 0) if on_cpu else 0
    columns = student.vocab_size + teacher.vocab_size if teacher else MLM_LOGITS * student.vocab_size
    return MemoryPlan(
        weights=0 if config.offload_param else share(student.parameters * width, 3),
        gradients=share(student.parameters * _bytes_per_gradient(batch, config), 2),
        optimizer_states=0
        if config.offload_optimizer
        else share(student.parameters * _bytes_per_optimizer_state(config), 1),
        buckets=_bucket_bytes(config),
        teacher=teacher.parameters * width // (batch.world_size if teacher_zero3 else 1) if teacher else 0,
        activations=tokens * _activation_bytes_per_token(student, seq_length, width, probability),
        logits=round(tokens * columns * width * head_share),
    )


def _bytes_per_optimizer_state(config: DeepSpeedConfig) -> int:
    has_master = config.precision != "fp32" or config.zero_stage > 0
    return ADAM_BYTES_PER_PARAMETER + MASTER_BYTES_PER_PARAMETER * has_master


def _bytes_per_gradient(batch: BatchEquation, config: DeepSpeedConfig) -> int:
    """Return the bytes of a parameter's gradient at the peak.

    With one micro-step the gradients themselves do not count: they are allocated while activations are freed.
    """
    width = BYTES["fp32"] if config.accumulates_in_fp32 else BYTES[config.precision]
    accumulates = batch.gradient_accumulation_steps > 1
    if not _keeps_every_gradient_in_fp32(config):
        return width * accumulates
    return width + BYTES[config.precision] * accumulates  # plus the gradients of the last micro-step


def _keeps_every_gradient_in_fp32(config: DeepSpeedConfig) -> bool:
    """Return whether DeepSpeed uses its bf16 optimiser of stage 1: all gradients in fp32 from the start, no buckets."""
    return (
        config.zero_stage == 1
        and config.precision == "bf16"
        and config.accumulates_in_fp32
        and not config.offload_optimizer
    )


def _bucket_bytes(config: DeepSpeedConfig) -> int:
    if config.zero_stage == 0 or _keeps_every_gradient_in_fp32(config):
        return 0
    return config.reduce_bucket_size * BYTES[config.precision] * (1 + config.overlap_comm)


def _bytes_per_probability(student: ModelShape, seq_length: int, width: int, has_dropout: bool) -> int:
    """Return the bytes that a CPU keeps per attention probability."""
    if width == BYTES["bf16"] and seq_length <= LONGEST_EAGER_ROW:
        return EAGER_PROBABILITIES + EAGER_DROPOUT * has_dropout + EAGER_ROTARY * student.is_rotary
    return SDPA_WITH_DROPOUT[width] * has_dropout


def _activation_bytes_per_token(student: ModelShape, seq_length: int, width: int, probability: int) -> int:
    attention = ROTARY_ACTIVATIONS if student.is_rotary else ATTENTION_ACTIVATIONS
    feed_forward = FEED_FORWARD_ACTIVATIONS
    if student.is_gated:
        feed_forward = GATED_ACTIVATIONS
    elif student.is_gelu_new:
        feed_forward = GELU_NEW_ACTIVATIONS
    per_layer = attention * student.hidden_size + feed_forward * student.intermediate_size
    activations = width * (student.layers * per_layer + OTHER_ACTIVATIONS * student.hidden_size)
    kept = student.heads * probability or width
    return activations + (MASK_BYTES + student.layers * kept) * seq_length
