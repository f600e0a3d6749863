"""Memory that one rank's tensors will take, estimated from shapes before anything is loaded.

    weights, gradients, optimiser states   by ZeRO's stage (Rajbhandari et al. 2020, section 3)
    reduction buckets                      DeepSpeed's, allocated whole
    activations                            what the student keeps for its backward pass, and both models' logits

The peak of a step is at the end of the student's forward pass (activations and logits stand, gradients of earlier
micro-steps too). Compared with measured peaks by tests/launch/test_memory.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distilspeed.kernels.implementation.distillation_loss_chunked import BLOCK_BYTES
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import accumulates_in_fp32
from distilspeed.trainer.families.shape import ModelShape

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# AdamW keeps two float32 moments; mixed precision and ZeRO add float32 copies of the weights that are updated.
ADAM_BYTES_PER_PARAMETER = 8
MASTER_BYTES_PER_PARAMETER = 4
# DeepSpeed's own, in elements.
REDUCE_BUCKET_SIZE = 500_000_000
# Tensors of [tokens, hidden size] kept for the backward pass: in each layer the inputs of its matrix products, norms
# and activation, those of the feed-forward part counting by its width; outside them embeddings and MLM head.
ATTENTION_ACTIVATIONS, FEED_FORWARD_ACTIVATIONS, OTHER_ACTIVATIONS = 9, 2, 6
# Attention with dropout as CPUs do it keeps probabilities, mask and their product, [heads, length] per token, in half
# precision as float32 and with the products' own copies.
KEPT_PROBABILITIES = {4: 3 * 4, 2: 4 * 4}
# Student's and teacher's; the gradient is written over the student's. Without a teacher: logits, float32 copy and
# gradient.
DISTILLATION_LOGITS = 2
MLM_LOGITS = 3
# What the losses work in on a CPU: three buffers, and copies of the labelled rows of one. A GPU needs none.
LOSS_BUFFERS = 4
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
    loss_buffers: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    student: ModelShape,
    teacher: ModelShape | None,
    batch: BatchEquation,
    seq_length: int,
    precision: str,
    deepspeed_config: Mapping[str, Any],
    *,
    teacher_zero3: bool = False,
    head_share: float = 1.0,
    on_cpu: bool = False,
    attention_dropout: float = 0.0,
) -> MemoryPlan:
    """Estimate the memory of one rank from shapes, ZeRO stage, offload and micro-batch.

    Args:
        head_share: of the tokens, those that have logits.
        on_cpu: where attention with dropout keeps its probabilities, and the losses work in buffers of their own.
        attention_dropout: of the student.
    """
    zero = deepspeed_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    width = BYTES[precision]

    def is_offloaded(what: str) -> bool:
        return (zero.get(what) or {}).get("device", "none") != "none"

    def share(size: int, from_stage: int, offload: str = "") -> int:
        if is_offloaded(offload):
            return 0
        return size // (batch.world_size if stage >= from_stage else 1)

    has_master = width < BYTES["fp32"] or stage > 0
    gradient_width = BYTES["fp32"] if accumulates_in_fp32(deepspeed_config) else width
    # DeepSpeed's optimiser for that case holds every gradient in fp32 from the start, and has no buckets.
    is_bf16_zero1 = (
        stage == 1
        and precision == "bf16"
        and gradient_width > width
        and not is_offloaded("offload_optimizer")
    )
    states = ADAM_BYTES_PER_PARAMETER + MASTER_BYTES_PER_PARAMETER * has_master
    accumulates = batch.gradient_accumulation_steps > 1
    # With one micro-step the gradients come when activations go.
    kept_gradients = gradient_width * (accumulates or is_bf16_zero1)
    if accumulates and is_bf16_zero1:  # which holds the last micro-step's own gradients, too
        kept_gradients += width
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE) * width * (1 + bool(zero.get("overlap_comm")))
    tokens = batch.micro_batch_size * seq_length
    per_layer = (
        ATTENTION_ACTIVATIONS * student.hidden_size + FEED_FORWARD_ACTIVATIONS * student.intermediate_size
    )
    activations = width * (student.layers * per_layer + OTHER_ACTIVATIONS * student.hidden_size)
    if on_cpu and attention_dropout > 0:
        activations += student.layers * student.heads * seq_length * KEPT_PROBABILITIES[width]
    logits = head_share * (DISTILLATION_LOGITS if teacher else MLM_LOGITS)
    return MemoryPlan(
        weights=share(student.parameters * width, 3, "offload_param"),
        gradients=share(student.parameters * kept_gradients, 2),
        optimizer_states=share(student.parameters * states, 1, "offload_optimizer"),
        buckets=bucket if stage > 0 and not is_bf16_zero1 else 0,
        teacher=teacher.parameters * width // (batch.world_size if teacher_zero3 else 1) if teacher else 0,
        activations=tokens * activations,
        logits=round(tokens * student.vocab_size * width * logits),
        loss_buffers=LOSS_BUFFERS * min(BLOCK_BYTES, tokens * student.vocab_size * BYTES["fp32"])
        if on_cpu and teacher
        else 0,
    )
