"""What a run will need before it starts: FLOPs per step and memory per GPU."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from distilspeed.trainer.config import BatchEquation
from distilspeed.trainer.masking import MASKED_FRACTION

FLOPS_PER_MULTIPLY_ADD = 2
# Backward computes two matrix products for each one of forward.
TRAINING_OVER_FORWARD = 3
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# AdamW keeps two float32 moments; half-precision training adds a float32 copy of the parameters.
ADAM_BYTES_PER_PARAMETER = 8
MASTER_BYTES_PER_PARAMETER = 4
# Tensors of [tokens, hidden size] that a Transformer layer keeps for its backward pass: the inputs of its
# matrix products, norms and activation, counting the four times wider feed-forward ones as four each.
ACTIVATIONS_PER_LAYER = 18
# Logits of student and teacher, and the gradient of the student's.
LOGITS_TENSORS = 3
GIB = 2**30


@dataclass(frozen=True)
class ModelShape:
    """The sizes of an encoder that FLOPs and memory follow from."""

    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    positions: int

    @property
    def parameters(self) -> int:
        """Weights of embeddings, layers and a tied MLM head; biases and norms (below 1 %) left out."""
        embeddings = (self.vocab_size + self.positions) * self.hidden_size
        return embeddings + self.layers * self._layer_weights + self.hidden_size**2

    @property
    def _layer_weights(self) -> int:
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size

    def forward_flops_per_token(self, seq_length: int, head_share: float = 1.0) -> float:
        """Matrix products only: projections, attention over the whole row, feed-forward, MLM head.

        ``head_share``: of the tokens, those that the MLM head is computed for.
        """
        attention = 2 * seq_length * self.hidden_size
        head = head_share * (self.hidden_size**2 + self.hidden_size * self.vocab_size)
        return FLOPS_PER_MULTIPLY_ADD * (self.layers * (self._layer_weights + attention) + head)


def model_shape(config: PreTrainedConfig) -> ModelShape:
    """Read the sizes from a Hugging Face config, whatever its architecture calls them."""
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or config.hidden_dim,
        vocab_size=config.vocab_size,
        positions=config.max_position_embeddings,
    )


def flops_per_token(student: ModelShape, teacher: ModelShape | None, seq_length: int) -> float:
    """FLOPs of one training step per token of a row: student forward and backward, teacher forward.

    Without a teacher only the masked tokens pass through the MLM head.
    """
    if teacher is None:
        return TRAINING_OVER_FORWARD * student.forward_flops_per_token(seq_length, MASKED_FRACTION)
    forward = student.forward_flops_per_token(seq_length)
    return TRAINING_OVER_FORWARD * forward + teacher.forward_flops_per_token(seq_length)


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes per GPU."""

    parameters: int
    gradients: int
    optimizer_states: int
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
    precision: str,
    deepspeed_config: Mapping[str, Any],
) -> MemoryPlan:
    """Estimate the memory of one rank from shapes, ZeRO stage, offload and micro-batch."""
    zero = deepspeed_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)

    def shard(from_stage: int) -> int:
        return batch.world_size if stage >= from_stage else 1

    half = precision != "fp32"
    width = BYTES[precision]
    states = ADAM_BYTES_PER_PARAMETER + (MASTER_BYTES_PER_PARAMETER if half else 0)
    tokens = batch.micro_batch_size * seq_length
    offloaded = "offload_optimizer" in zero and zero["offload_optimizer"].get("device") != "none"
    return MemoryPlan(
        parameters=student.parameters * width // shard(3),
        gradients=student.parameters * width // shard(2),
        optimizer_states=0 if offloaded else student.parameters * states // shard(1),
        teacher=teacher.parameters * width if teacher else 0,
        activations=tokens * student.hidden_size * student.layers * ACTIVATIONS_PER_LAYER * width,
        logits=round(
            tokens
            * student.vocab_size
            * width
            * (LOGITS_TENSORS if teacher else MASKED_FRACTION * LOGITS_TENSORS)
        ),
    )


def describe(
    batch: BatchEquation,
    steps: int,
    num_rows: int,
    seq_length: int,
    flops: float,
    memory: MemoryPlan,
    precision: str,
    stage: int,
) -> str:
    """The text that ``--plan`` prints."""
    tokens_per_step = batch.train_batch_size * seq_length
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.2f}" for name, size in vars(memory).items())
    return "\n".join(
        [
            f"batch:   {batch}",
            f"steps:   {steps} of {tokens_per_step:,} tokens, "
            f"{steps * batch.train_batch_size / num_rows:.2f} epochs of {num_rows:,} rows",
            f"FLOPs:   {flops * tokens_per_step:.3g} per step, {flops * tokens_per_step * steps:.3g} in all",
            f"memory:  {memory.total / GIB:.2f} GiB per GPU, estimated, {precision}, ZeRO-{stage} ({parts})",
        ]
    )


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device now: the denominator of MFU.

    A measured peak holds on any device; a table of data-sheet peaks does not.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    seconds = min(_seconds_of_product(a, b) for _ in range(5))
    return FLOPS_PER_MULTIPLY_ADD * size**3 / seconds


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize(a.device)
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    a @ b
    return time.perf_counter() - start
