"""Tile and warps for the kernel of the distillation loss, from a table made beforehand.

Not chosen at run time: a kernel that times itself first gives sums in another order on another day, and a
surprise at every new shape. ``launch_configs.json`` is made by ``launch/profile_kernels.py --tune``: where a GPU
is at hand by timing, for all other architectures from what the compiler says (``profiling.tuning``). Each entry
states which, and the compiled kernel's registers, spilled bytes and shared memory.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TABLE_FILE = Path(__file__).with_name("launch_configs.json")
WARP_THREADS = 32
ACCESS_BYTES = 16  # of one load or store of a thread, the widest there is

Pass = Literal["forward", "backward", "forward_backward"]


class LaunchConfig(NamedTuple):
    tile: int  # columns, a power of two
    num_warps: int


@dataclass(frozen=True)
class TableEntry:
    """The launch for one pass on one architecture, and how it came about."""

    architecture: int  # compute capability, 90 for 9.0
    dtype_bytes: int
    pass_name: Pass
    vocab_size: int
    tile: int
    num_warps: int
    registers: int  # a thread
    spilled_bytes: int  # a thread, loads and stores
    shared_bytes: int  # a program
    chosen_by: str


def read_table(file: Path = TABLE_FILE) -> tuple[TableEntry, ...]:
    return tuple(TableEntry(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["entries"])


def launch_config(pass_name: Pass, logits: Tensor, vocab_size: int) -> LaunchConfig:
    """The table's launch for the GPU the logits are on, or the nearest thing to it."""
    capability = torch.cuda.get_device_capability(logits.device) if logits.is_cuda else (0, 0)
    return nearest_config(pass_name, 10 * capability[0] + capability[1], logits.element_size(), vocab_size)


@lru_cache(maxsize=1024)
def nearest_config(pass_name: Pass, architecture: int, dtype_bytes: int, vocab_size: int) -> LaunchConfig:
    return choose_entry(read_table(), pass_name, architecture, dtype_bytes, vocab_size)


def choose_entry(
    table: Sequence[TableEntry], pass_name: Pass, architecture: int, dtype_bytes: int, vocab_size: int
) -> LaunchConfig:
    """Newest listed architecture not above this one (else the oldest), then the nearest vocabulary size."""
    entries = [entry for entry in table if (entry.pass_name, entry.dtype_bytes) == (pass_name, dtype_bytes)]
    architectures = {entry.architecture for entry in entries}
    known = max((a for a in architectures if a <= architecture), default=min(architectures))
    entry = min(
        (entry for entry in entries if entry.architecture == known),
        key=lambda entry: max(entry.vocab_size, vocab_size) / min(entry.vocab_size, vocab_size),
    )
    return fit_to_vocabulary(LaunchConfig(entry.tile, entry.num_warps), vocab_size)


def fit_to_vocabulary(config: LaunchConfig, vocab_size: int) -> LaunchConfig:
    """No tile much wider than the vocabulary, and no thread without columns."""
    tile = min(config.tile, max(16, 1 << (vocab_size - 1).bit_length()))
    return LaunchConfig(tile, max(1, config.num_warps * tile // config.tile))


def padded_width(vocab_size: int) -> int:
    """Columns to give rows of logits so that each begins at a multiple of 128 bytes or more, and loads are wide."""
    return -(-vocab_size // 64) * 64


def tile_constants(config: LaunchConfig, alignment: int, dtype_bytes: int) -> dict[str, int]:
    """How a tile is dealt out to threads, as arguments of the kernel.

    Rows that begin at multiples of a widest access are loaded so, and a thread's group is what it loads at once.
    Others are loaded ``alignment`` logits at a time, neighbouring threads neighbouring ones, and a group is made
    of a thread's loads; wider it would span threads, which would have to wait for each other at every tile.
    """
    access = ACCESS_BYTES // dtype_bytes
    neighbours = alignment == access
    loads_of_thread = config.tile // (WARP_THREADS * config.num_warps * alignment)
    return {
        "TILE": config.tile,
        "ALIGNMENT": alignment,
        "GROUP": access if neighbours else max(1, loads_of_thread),
        "NEIGHBOURS": neighbours,
    }
