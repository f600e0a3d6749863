"""The size and speed of a model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, read_rows
from distilspeed.trainer.models.inputs import call_options
from distilspeed.trainer.models.timing import seconds_of

LENGTHS = (32, 128, 512)
BATCH_SIZES = (1, 32)
# The setting that stands for all in tables and plots: one sequence of 128 tokens, or the longest that fits.
HEADLINE_LENGTH, HEADLINE_BATCH_SIZE = 128, 1
# Per model and setting. A pass of BERT-base at 32 x 512 tokens takes 10 s on 2 cores.
WARM_UP_SECONDS, SECONDS = 0.1, 1.0
REPETITIONS = (3, 200)  # minimum, maximum


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass without the head; ``speed_up``: the teacher's median over this median."""

    device: str  # CPU or GPU
    batch_size: int
    length: int  # tokens per sequence
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    repetitions: int
    speed_up: float

    @classmethod
    def of(
        cls,
        device: str,
        shape: Sequence[int],
        times: NDArray[np.float64],
        teacher_times: NDArray[np.float64],
    ) -> "Latency":
        """Summarise milliseconds, float64 [repetitions], of inputs of shape (batch size, length)."""
        batch_size, length = shape
        first, median, third = np.percentile(times, [25, 50, 75]).tolist()
        speed_up = float(np.median(teacher_times)) / median
        return cls(device, batch_size, length, median, first, third, len(times), speed_up)


def headline_latencies(latencies: Sequence[Latency]) -> list[Latency]:
    """Return the latencies at the headline setting, one per device."""
    length = max(latency.length for latency in latencies if latency.length <= HEADLINE_LENGTH)
    setting = (HEADLINE_BATCH_SIZE, length)
    return [latency for latency in latencies if (latency.batch_size, latency.length) == setting]


def latency_inputs(corpus: Corpus, positions: int) -> list[torch.Tensor]:
    """Return inputs of every length that fits ``positions``, and of every batch size.

    They are the real tokens of held-out rows, joined and cut; if there are too few, they are repeated.

    Returns:
        int64 [batch size, length] each, without padding.
    """
    lengths = [length for length in LENGTHS if length <= positions] or [positions]
    most_rows = max(1, max(BATCH_SIZES) * lengths[-1] // corpus.manifest.seq_length)
    rows = read_rows(corpus.held_out, range(min(len(corpus.held_out), most_rows)))
    joined = np.concatenate(
        [
            ids[: of_documents.sum()]
            for ids, of_documents in zip(rows.input_ids, rows.document_lengths, strict=True)
        ]
    )
    return [
        torch.from_numpy(np.resize(joined, (batch_size, length)))
        for batch_size in BATCH_SIZES
        for length in lengths
    ]


@torch.inference_mode()
def measure_latency(
    models: Sequence[PreTrainedModel], input_ids: torch.Tensor, device: torch.device
) -> list[NDArray[np.float64]]:
    """Measure forward passes without the heads on a batch: milliseconds, float64 [repetitions] per model.

    The models take turns, so a slow phase of the machine affects all of them. Each model gets about a second, but at
    least 3 passes after one to warm up. The function leaves the models on ``device`` in evaluation mode.

    Args:
        input_ids: int64 [batch size, length], without padding.
    """
    inputs = {"input_ids": input_ids.to(device), "attention_mask": torch.ones_like(input_ids).to(device)}
    passes = [
        partial(nn.Module.to(model, device).eval().base_model, **inputs, **call_options(model))
        for model in models
    ]
    _take_turns(passes, device, WARM_UP_SECONDS, (1, REPETITIONS[1]))
    return list(np.array(_take_turns(passes, device, SECONDS, REPETITIONS)).T)


def _take_turns(
    passes: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float,
    repetitions: tuple[int, int],
) -> list[list[float]]:
    """Return the milliseconds of every pass, one list per turn, for ``seconds`` per model."""
    at_least, at_most = repetitions
    deadline = time.perf_counter() + seconds * len(passes)
    turns: list[list[float]] = []
    while len(turns) < at_least or (len(turns) < at_most and time.perf_counter() < deadline):
        turns.append([1000 * seconds_of(forward, device) for forward in passes])
    return turns
