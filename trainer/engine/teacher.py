"""The frozen teacher: whole on every rank, or its weights shared out over the ranks by ZeRO-3."""

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
    """A teacher that takes a micro-batch and gives its outputs; called by every rank.

    Args:
        model: which becomes this teacher's.
        dtype: of its weights.
        deepspeed_config: the student's, resolved.
        share_out: its weights over the ranks (``--teacher_zero3``).
    """
    if share_out:
        return ShardedTeacher(model, dtype, deepspeed_config)
    return ReplicatedTeacher(model, dtype, device)


class ReplicatedTeacher:
    """The whole teacher on this rank's device; it has no gradients and no optimiser states."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
        self.model = nn.Module.to(model, device=device, dtype=dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, batch: MicroBatch, places: torch.Tensor | None = None, layers: Sequence[int] = ()
    ) -> ModelOutputs:
        """Its outputs on packed rows, with logits at ``places`` of them; see :func:`forward_packed`."""
        return forward_packed(self.model, batch, places, layers)


class ShardedTeacher:
    """The teacher with each weight in pieces on all ranks, gathered layer by layer while it runs (ZeRO-3).

    Its outputs are the replicated teacher's, to the bit. Every rank must call it equally often.

    Args:
        model: the whole teacher on the CPU; it comes to the devices weight by weight, never whole.
        dtype: of its weights.
        deepspeed_config: the student's, resolved; the teacher takes its precision and micro-batch.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, deepspeed_config: DeepSpeedConfig) -> None:
        config = teacher_config(deepspeed_config)
        module = _PackedForward(nn.Module.to(model, dtype=dtype).requires_grad_(False))
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
        self.engine, *_ = deepspeed.initialize(model=module, config=config)
        self.engine.eval()

    @torch.no_grad()
    def __call__(
        self, batch: MicroBatch, places: torch.Tensor | None = None, layers: Sequence[int] = ()
    ) -> ModelOutputs:
        """As the replicated teacher's."""
        return self.engine(batch, places, layers)


class _PackedForward(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch, places: torch.Tensor | None, layers: Sequence[int]) -> ModelOutputs:
        return forward_packed(self.model, batch, places, layers)


def teacher_config(student: DeepSpeedConfig) -> dict[str, Any]:
    """The DeepSpeed config of a sharded teacher: ZeRO-3 without an optimiser, in the precision of the student."""
    kept = (MICRO_BATCH_SIZE, "fp16", "bf16")
    # Else DeepSpeed puts a linear layer of its own, which adds the bias after rounding, in the place of PyTorch's for
    # the whole process: the student's too. It spares backward passes memory, and the teacher has none.
    zero = {"stage": 3, "memory_efficient_linear": False}
    taken = {key: value for key, value in student.to_dict().items() if key in kept}
    return taken | {"zero_optimization": zero}
