"""The frozen teacher: replicated on every rank, or sharded over the ranks by ZeRO-3."""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.engine.config import MICRO_BATCH_SIZE, DeepSpeedConfig
from distilspeed.trainer.models.packed_forward import ModelOutputs, forward_packed


def make_teacher(
    model: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    deepspeed_config: DeepSpeedConfig,
    share_out: bool,
) -> "ReplicatedTeacher | ShardedTeacher":
    """Return a teacher that maps a micro-batch to its outputs; called by every rank.

    Args:
        model: the teacher's model; it is modified in place.
        dtype: dtype of the weights.
        deepspeed_config: the student's resolved config.
        share_out: shard the weights over the ranks (``--teacher_zero3``).
    """
    if share_out:
        return ShardedTeacher(model, dtype, deepspeed_config)
    return ReplicatedTeacher(model, dtype, device)


class ReplicatedTeacher:
    """The whole teacher on this rank's device, without gradients and optimiser states."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
        self.model = nn.Module.to(_cast_weights(model, dtype), device=device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, batch: MicroBatch, places: torch.Tensor | None = None, layers: Sequence[int] = ()
    ) -> ModelOutputs:
        """Return the outputs on packed rows, with logits at ``places``; see :func:`forward_packed`."""
        return forward_packed(self.model, batch, places, layers)


class ShardedTeacher:
    """The teacher with every weight sharded over the ranks and gathered layer by layer in the forward pass (ZeRO-3).

    Its outputs equal the replicated teacher's bit for bit. Every rank must call it the same number of times.

    Args:
        model: the whole teacher on the CPU; weights move to the devices one at a time, so a device never holds all.
        dtype: dtype of the weights.
        deepspeed_config: the student's resolved config; the teacher uses its precision and micro-batch.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, deepspeed_config: DeepSpeedConfig) -> None:
        config = teacher_config(deepspeed_config)
        module = _PackedForward(_cast_weights(model, dtype).requires_grad_(False))
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
        self.engine, *_ = deepspeed.initialize(model=module, config=config)
        self.engine.eval()

    @torch.no_grad()
    def __call__(
        self, batch: MicroBatch, places: torch.Tensor | None = None, layers: Sequence[int] = ()
    ) -> ModelOutputs:
        """Return the same outputs as :class:`ReplicatedTeacher`."""
        return self.engine(batch, places, layers)


def _cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the weights but not the buffers, as DeepSpeed does: rotary frequencies need float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


class _PackedForward(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, places: torch.Tensor | None, layers: Sequence[int]) -> ModelOutputs:
        return forward_packed(self.model, batch, places, layers)


def teacher_config(student: DeepSpeedConfig) -> dict[str, Any]:
    """Return the DeepSpeed config of a sharded teacher: ZeRO-3 without an optimiser, in the student's precision."""
    kept = (MICRO_BATCH_SIZE, "fp16", "bf16")
    # Otherwise DeepSpeed replaces PyTorch's linear layer in the whole process, including the student. Its layer adds
    # the bias after rounding. It saves memory in backward passes only, and the teacher has none.
    zero = {"stage": 3, "memory_efficient_linear": False}
    taken = {key: value for key, value in student.to_dict().items() if key in kept}
    return taken | {"zero_optimization": zero}
