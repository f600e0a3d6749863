"""The size and speed of a model."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.models.inputs import call_options
from distilspeed.trainer.models.timing import seconds_of

WARM_UP_PASSES = 3
SECONDS_PER_MODEL = 3.0
REPETITIONS = (10, 200)  # minimum, maximum


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_bytes(name: str) -> int:
    """Return the bytes on disk of the safetensors weights of a model folder, or of a hub id already downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, allow_patterns="model*.safetensors", local_files_only=True))
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


@torch.inference_mode()
def measure_latency(
    models: Sequence[PreTrainedModel], input_ids: torch.Tensor, device: torch.device
) -> list[NDArray[np.float64]]:
    """Measure the forward passes of the encoders on one sequence: milliseconds, float64 [repetitions] per model.

    The models take turns, so a slow phase of the machine affects all of them. Each model gets about 3 seconds. The
    function leaves the models on ``device`` in evaluation mode.

    Args:
        input_ids: int64 [1, length], without padding.
    """
    inputs = {"input_ids": input_ids.to(device), "attention_mask": torch.ones_like(input_ids).to(device)}
    passes = [
        partial(nn.Module.to(model, device).eval().base_model, **inputs, **call_options(model))
        for model in models
    ]
    for forward in passes * WARM_UP_PASSES:
        _milliseconds(forward, device)
    times: list[list[float]] = []
    at_least, at_most = REPETITIONS
    deadline = time.perf_counter() + SECONDS_PER_MODEL * len(models)
    while len(times) < at_least or (len(times) < at_most and time.perf_counter() < deadline):
        times.append([_milliseconds(forward, device) for forward in passes])
    return list(np.array(times).T)


def _milliseconds(forward: Callable[[], object], device: torch.device) -> float:
    return 1000 * seconds_of(forward, device)
