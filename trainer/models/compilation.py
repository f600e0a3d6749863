"""Compile the encoders with torch.compile."""

import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import calculate_time_spent
from torch.nn import functional
from transformers import PreTrainedModel

from distilspeed.trainer.errors import first_line
from distilspeed.trainer.families.registry import family_of

# Triton, which compiles for GPUs, supports no older ones.
OLDEST_CAPABILITY = (7, 0)


def compiling_pays(device: torch.device) -> bool:
    """Return whether compiled encoders are expected to be faster on a device, with the same bits in every process.

    On CPUs they gain nothing for a student with dropout, because compiled random numbers are slower there. Older
    versions of PyTorch have no deterministic compiler: they choose a kernel's order of summation by timing, so a
    resumed run could compute other bits.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
        and hasattr(inductor, "deterministic")
    )


def compiler_fault(device: torch.device) -> str | None:
    """Compile a small function and differentiate it; return in one line what failed, or None."""

    def layer(states: torch.Tensor) -> torch.Tensor:
        return functional.gelu(functional.layer_norm(states, states.shape[-1:]))

    states = torch.linspace(-1, 1, 256, device=device).view(4, 64).requires_grad_()
    try:
        torch.compile(layer, dynamic=False)(states).sum().backward()
    except Exception as error:  # from Inductor, Triton, their C compiler or the driver
        return first_line(error)
    return None


def compile_encoder(model: PreTrainedModel) -> None:
    """Compile the layers in place, when the first one runs; shapes are constant, so one compilation serves all.

    The embeddings stay as they are: compiled, threads would add to a token's gradient in any order.
    """
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
    for layer in family_of(model.config).layers(model):
        layer.compile(dynamic=False)


def seconds_compiling() -> float:
    """Return how long torch.compile has worked in this process."""
    return calculate_time_spent()["total_wall_time"]
