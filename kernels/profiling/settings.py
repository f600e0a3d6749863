"""The settings of a profile: the command line of ``launch/profile_kernels.py``.

torch is imported inside functions, because the parser is made from this file and importing torch takes seconds.
"""

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from distilspeed.kernels.profiling.problem import Problem

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # torch's names
# A round takes tens of milliseconds on a GPU, a minute on two CPU cores.
DEFAULT_REPEATS = {"cuda": 50, "cpu": 5}
DEFAULT_DTYPE = {"cuda": "fp16", "cpu": "fp32"}
GIB = 2**30
# Tensors as large as the logits that exist at once: the inputs and 7 in the eager recipe (834 MiB for logits of
# 119, November 2026). A GPU raises an error if a peer does not fit, and the peer is skipped; a CPU's process is killed.
LOGITS_ALIVE = {"cuda": 3, "cpu": 9}
# Tensors as large as a projection's input and weight: the inputs, the gradient, and Liger's second gradient.
PROJECTIONS_ALIVE = 4


class ProfileError(ValueError):
    """A bad setting: ``what is wrong; what to do``."""


def _all_peers() -> frozenset[str]:
    from distilspeed.kernels.profiling.peers import PEERS

    return PEERS


def peer_set(text: str) -> frozenset[str]:
    return frozenset() if text == "none" else frozenset(text.split(","))


def _number(default: Any, help: str) -> Any:
    return field(default=default, metadata={"type": int, "metavar": "N", "help": help})


@dataclass(frozen=True)
class ProfileSettings:
    """The command line of ``launch/profile_kernels.py``; a field's metadata describes its flag.

    None means the device's default.

    Raises:
        ProfileError: a value is out of range, or this machine's device does not support it.
    """

    tokens: int = _number(4096, "rows of the logits")
    vocab_size: int = _number(30522, "columns of the logits")
    hidden_size: int = _number(768, "width of the hidden states")
    temperature: float = field(default=2.0, metadata={"type": float, "help": "of the soft targets"})
    dtype: str | None = field(
        default=None, metadata={"choices": tuple(DTYPES), "help": "default: fp16 on a GPU, fp32 on a CPU"}
    )
    device: str = field(
        default="auto", metadata={"choices": DEVICES, "help": "auto: the GPU if there is one"}
    )
    repeats: int | None = _number(None, "rounds to measure (default: 50 on a GPU, 5 on a CPU)")
    peers: frozenset[str] = field(
        default_factory=_all_peers,
        metadata={
            "type": peer_set,
            "metavar": "NAME,NAME",
            "help": "peers to compare with: any of eager,compile,liger,nemo, or none (default: all)",
        },
    )

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab_size", "hidden_size", "repeats"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ProfileError(f"--{name} must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise ProfileError("--temperature must be a positive number")
        if self.dtype not in (None, *DTYPES):
            raise ProfileError(f"--dtype must be one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise ProfileError(f"--device must be one of {', '.join(DEVICES)}")
        if not self.peers <= _all_peers():
            unknown = ", ".join(sorted(self.peers - _all_peers()))
            raise ProfileError(
                f"--peers has unknown names: {unknown}; use any of {', '.join(sorted(_all_peers()))}, or none"
            )
        self._check_device()

    def _check_device(self) -> None:
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ProfileError("--device cuda needs a GPU, and PyTorch finds none; use --device cpu")
        on_gpu, is_bf16 = self.place.type == "cuda", self.problem.dtype == torch.bfloat16
        if on_gpu and is_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ProfileError(f"{torch.cuda.get_device_name()} has no bf16; use --dtype fp16 or fp32")
        needed, there = self._memory_needed(), device_memory(self.place)
        if needed > there:
            raise ProfileError(
                f"this needs about {needed / GIB:,.0f} GiB of memory, and the device has {there / GIB:,.0f}; "
                "use fewer --tokens"
            )

    def _memory_needed(self) -> int:
        logits = self.tokens * self.vocab_size
        projections = (self.tokens + self.vocab_size) * self.hidden_size
        entries = LOGITS_ALIVE[self.place.type] * logits + PROJECTIONS_ALIVE * projections
        return entries * self.problem.dtype.itemsize

    @property
    def place(self) -> "torch.device":
        """The device; ``auto`` is the GPU if there is one."""
        import torch

        return torch.device("cpu" if self.device == "cpu" or not torch.cuda.is_available() else "cuda")

    @property
    def problem(self) -> "Problem":
        import torch

        from distilspeed.kernels.profiling.problem import Problem

        return Problem(
            tokens=self.tokens,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            temperature=self.temperature,
            dtype=getattr(torch, DTYPES[self.dtype or DEFAULT_DTYPE[self.place.type]]),
            device=self.place,
        )

    @property
    def rounds(self) -> int:
        return self.repeats or DEFAULT_REPEATS[self.place.type]


def device_memory(device: "torch.device") -> int:
    """Return the device's total memory in bytes."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
