"""Choose the fastest implementation of attention within documents, by measurement."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.errors import first_line
from distilspeed.trainer.families.masks import EAGER, FLEX, VARLEN, Documents
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.models.varlen_attention import OLDEST_VARLEN_CAPABILITY, VARLEN_DTYPES

logger = logging.getLogger(__name__)

# transformers' name, like FLEX. SDPA supports a mask and dropout on every device (on V100 with the memory-efficient
# kernel). FLEX skips blocks of keys from other documents, but has no dropout. VARLEN skips them and has dropout, but
# only in half precision.
SDPA = "sdpa"
# flex_attention uses Triton's matrix products, which are slow or broken below this compute capability.
OLDEST_FLEX_CAPABILITY = (8, 0)
# On CPUs EAGER is for rows of at most so many tokens: the probabilities that it keeps grow with the square.
LONGEST_EAGER_ROW = 512
WARM_UP_RUNS, RUNS = 2, 5
# Relative to the largest value. Sums in another order differ by less, also in half precision.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class AttentionChoice:
    """The chosen implementation, and the seconds of each measured one; ``seconds`` is empty if none was measured."""

    implementation: str
    seconds: dict[str, float]

    def __str__(self) -> str:
        if not self.seconds:
            return self.implementation
        times = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in self.seconds.items())
        return f"{self.implementation} (measured: {times})"


def attention_candidates(
    device: torch.device, dtype: torch.dtype, seq_length: int, dropout: float, is_trained: bool
) -> tuple[str, ...]:
    """Return the implementations that can compute attention within documents on a device.

    On a CPU the choice needs no measurement, so it is the same on a busy machine: SDPA's backward pass in bfloat16
    takes about three times as long as EAGER's; in float32 it is as fast or faster.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and is_trained and seq_length <= LONGEST_EAGER_ROW:
        return (EAGER,)
    if device.type != "cuda":
        return (SDPA,)
    capability = torch.cuda.get_device_capability(device)
    candidates = [SDPA]
    if capability >= OLDEST_VARLEN_CAPABILITY and dtype in VARLEN_DTYPES:
        candidates.append(VARLEN)
    if capability >= OLDEST_FLEX_CAPABILITY and not dropout:
        candidates.append(FLEX)
    return tuple(candidates)


def choose_attention(
    model: PreTrainedModel,
    documents: Documents,
    dtype: torch.dtype,
    device: torch.device,
    is_trained: bool,
    candidates: Sequence[str] | None = None,
) -> AttentionChoice:
    """Set the model to the fastest attention implementation whose output and gradient equal those of SDPA.

    The measurement runs the model's first attention on random hidden states with the documents of a micro-batch:
    forward, and backward if ``is_trained``. The time includes one layer's share of making the mask.

    Args:
        documents: of a micro-batch.
        candidates: default :func:`attention_candidates`; a single candidate is not measured.
    """
    family = family_of(model.config)
    if candidates is None:
        dropout = family.attention_dropout(model.config) if is_trained else 0.0
        candidates = attention_candidates(device, dtype, documents.ids.shape[1], dropout, is_trained)
    # transformers does not run every architecture with flex attention: GPT-2 is one that it refuses.
    candidates = [name for name in candidates if name != FLEX or model._supports_flex_attn]
    if len(candidates) == 1:
        model.set_attn_implementation(candidates[0])
        return AttentionChoice(candidates[0], {})
    attention = nn.Module.to(copy.deepcopy(family.first_attention(model)), device, dtype)
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(*documents.ids.shape, model.config.hidden_size, generator=generator)
    hidden_states = hidden_states.to(device, dtype).requires_grad_(is_trained)
    seconds: dict[str, float] = {}
    documents = Documents(*(tensor.to(device) for tensor in documents))
    expected = None
    for name in candidates:
        try:
            values, took = _timed_attention(attention, name, hidden_states, documents)
        except Exception as error:  # the compiler, the driver and torch raise many types
            logger.warning("attention %s does not run on this device: %s", name, first_line(error))
            continue
        expected = values if expected is None else expected
        if any(_differ(*pair, TOLERANCE[dtype]) for pair in zip(values, expected, strict=True)):
            logger.warning("attention %s is not used: its values differ from %s on this device", name, SDPA)
            continue
        seconds[name] = took
    fastest = min(seconds, key=lambda name: seconds[name])
    model.set_attn_implementation(fastest)
    return AttentionChoice(fastest, seconds)


def _timed_attention(
    attention: Any, name: str, hidden_states: torch.Tensor, documents: Documents
) -> tuple[list[torch.Tensor], float]:
    """Return the output without dropout and, if the states require it, their gradient; and the seconds of a run."""
    config, family = attention.config, family_of(attention.config)
    config._attn_implementation = name
    attention.train(hidden_states.requires_grad)
    times = []
    for _ in range(WARM_UP_RUNS + RUNS):
        _wait_for(hidden_states.device)
        start = time.perf_counter()
        mask = family.attention_mask(config, documents, name)
        _wait_for(hidden_states.device)
        made = time.perf_counter()
        with torch.set_grad_enabled(hidden_states.requires_grad):
            output = attention(hidden_states, attention_mask=mask)[0]
        if output.requires_grad:
            output.sum().backward()
        _wait_for(hidden_states.device)
        times.append((made - start) / config.num_hidden_layers + time.perf_counter() - made)
    with torch.set_grad_enabled(hidden_states.requires_grad):
        output = attention.eval()(hidden_states, attention_mask=mask)[0]
    values = [output.detach()]
    if output.requires_grad:
        values += torch.autograd.grad(output, hidden_states, grad_outputs=hidden_states.detach())
    return values, min(times[WARM_UP_RUNS:])


def _differ(values: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    difference = (values.float() - expected.float()).abs().max()
    return not bool(difference <= tolerance * expected.float().abs().max())  # NaN differs


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
