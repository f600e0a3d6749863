"""Attention within documents: the mask of packed rows, and which implementation computes it, chosen by measurement."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import BertForMaskedLM, DistilBertForMaskedLM, PreTrainedModel

from distilspeed.trainer.errors import first_line

logger = logging.getLogger(__name__)

# Both by transformers' names. "sdpa" takes a mask and dropout everywhere (on V100 by the memory-efficient kernel);
# "flex_attention" skips blocks of keys from other documents, and has no dropout.
SDPA, FLEX = "sdpa", "flex_attention"
# Below this compute capability Triton's matrix products, of which flex_attention is made, are slow or broken.
OLDEST_FLEX_CAPABILITY = (8, 0)
WARM_UP_RUNS, RUNS = 2, 5
# Of the largest value: half-precision sums in another order differ by less.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def document_mask(document_ids: torch.Tensor, implementation: str | None) -> torch.Tensor | BlockMask:
    """Which tokens of packed rows see each other: those of one document.

    Padding sees padding: a row of the mask with nothing in it would give NaN.

    Args:
        document_ids: int64 [rows, length], -1 on padding.
        implementation: transformers' name of the attention that takes the mask.

    Returns:
        bool [rows, 1, length, length], or for "flex_attention" its BlockMask.
    """
    if implementation == FLEX:
        rows, length = document_ids.shape
        return create_block_mask(
            lambda row, head, query, key: document_ids[row, query] == document_ids[row, key],
            rows,
            None,
            length,
            length,
            device=document_ids.device,
        )
    return (document_ids[:, :, None] == document_ids[:, None, :])[:, None]


@dataclass(frozen=True)
class AttentionChoice:
    """An implementation and the seconds that each one measured took; no seconds where nothing was measured."""

    implementation: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        if not self.seconds:
            return self.implementation
        times = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in self.seconds.items())
        return f"{self.implementation} (measured: {times})"


def attention_candidates(device: torch.device, dropout: float) -> tuple[str, ...]:
    """The implementations that can compute attention within documents on a device."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_FLEX_CAPABILITY
    return (SDPA, FLEX) if capable and not dropout else (SDPA,)


def choose_attention(
    model: PreTrainedModel,
    document_ids: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    is_trained: bool,
    candidates: Sequence[str] | None = None,
) -> AttentionChoice:
    """Set the model's attention to the fastest that gives the same as SDPA, on the shape of real packed rows.

    The model's first attention is timed, forward and, where it is trained, backward, with its share of making the mask,
    which all layers use.

    Args:
        document_ids: int64 [rows, length], those of a micro-batch.
        candidates: None: :func:`attention_candidates`, which leaves nothing to measure on many devices.
    """
    attention = first_attention(model)
    if candidates is None:
        candidates = attention_candidates(device, attention.dropout.p if is_trained else 0.0)
    if len(candidates) == 1:
        model.set_attn_implementation(candidates[0])
        return AttentionChoice(candidates[0], {})
    attention = nn.Module.to(copy.deepcopy(attention), device, dtype)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(*document_ids.shape, model.config.hidden_size, generator=generator)
    hidden_states = hidden_states.to(device, dtype).requires_grad_(is_trained)
    seconds: dict[str, float] = {}
    expected = None
    for name in candidates:
        try:
            output, took = _timed_attention(attention, name, hidden_states, document_ids.to(device))
        except Exception as error:  # the compiler's, the driver's and torch's own, of every kind
            logger.warning("attention %s does not run here: %s", name, first_line(error))
            continue
        expected = output if expected is None else expected
        if (output - expected).abs().max() > TOLERANCE[dtype] * expected.abs().max():
            logger.warning("attention %s gives other values than %s here and is not used", name, SDPA)
            continue
        seconds[name] = took
    fastest = min(seconds, key=lambda name: seconds[name])
    model.set_attn_implementation(fastest)
    return AttentionChoice(fastest, seconds)


def first_attention(model: PreTrainedModel) -> Any:
    """The module of transformers that computes the first layer's attention, projections of its inputs included."""
    encoder: Any = model.base_model
    if isinstance(model, BertForMaskedLM):
        return encoder.encoder.layer[0].attention.self
    if isinstance(model, DistilBertForMaskedLM):
        return encoder.transformer.layer[0].attention
    raise TypeError(f"{type(model).__name__} has passed no check_architecture")


def _timed_attention(
    attention: Any, name: str, hidden_states: torch.Tensor, document_ids: torch.Tensor
) -> tuple[torch.Tensor, float]:
    attention.config._attn_implementation = name
    attention.train(hidden_states.requires_grad)
    times = []
    for _ in range(WARM_UP_RUNS + RUNS):
        _wait_for(hidden_states.device)
        start = time.perf_counter()
        mask = document_mask(document_ids, name)
        _wait_for(hidden_states.device)
        made = time.perf_counter()
        with torch.set_grad_enabled(hidden_states.requires_grad):
            output = attention(hidden_states, attention_mask=mask)[0]
        if output.requires_grad:
            output.sum().backward()
        _wait_for(hidden_states.device)
        times.append((made - start) / attention.config.num_hidden_layers + time.perf_counter() - made)
    with torch.no_grad():
        return attention.eval()(hidden_states, attention_mask=mask)[0].float(), min(times[WARM_UP_RUNS:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
