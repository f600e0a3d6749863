"""Tile and warps for the kernel of the distillation loss, from a stored table.

They are not autotuned at run time: another choice would change the order of sums from run to run, and every new
shape would have to be timed first. ``launch/profile_kernels.py --tune`` makes ``launch_configs.json``: by timing for
the GPU of the machine, from the compiler's figures for all other architectures (``profiling.tuning``). Each entry
records how it was chosen, and the compiled kernel's registers, spilled bytes and shared memory.
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
ACCESS_BYTES = 16  # a thread's widest load or store

Pass = Literal["forward", "backward", "forward_backward"]


class LaunchConfig(NamedTuple):
    tile: int  # columns, a power of two
    num_warps: int


@dataclass(frozen=True)
class TableEntry:
    """The launch for one pass on one architecture, and how it was chosen."""

    architecture: int  # compute capability, 90 for 9.0
    dtype_bytes: int
    pass_name: Pass
    vocab_size: int
    tile: int
    num_warps: int
    registers: int  # per thread
    spilled_bytes: int  # per thread, loads and stores
    shared_bytes: int  # per program
    chosen_by: str


def read_table(file: Path = TABLE_FILE) -> tuple[TableEntry, ...]:
    return tuple(TableEntry(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))["entries"])


def launch_config(pass_name: Pass, logits: Tensor, vocab_size: int) -> LaunchConfig:
    """Return the table's launch for the GPU that holds the logits, or the nearest entry."""
    capability = torch.cuda.get_device_capability(logits.device) if logits.is_cuda else (0, 0)
    return nearest_config(pass_name, 10 * capability[0] + capability[1], logits.element_size(), vocab_size)


@lru_cache(maxsize=1024)
def nearest_config(pass_name: Pass, architecture: int, dtype_bytes: int, vocab_size: int) -> LaunchConfig:
    return choose_entry(read_table(), pass_name, architecture, dtype_bytes, vocab_size)


def choose_entry(
    table: Sequence[TableEntry], pass_name: Pass, architecture: int, dtype_bytes: int, vocab_size: int
) -> LaunchConfig:
    """Return the launch of the newest listed architecture not above this one (else the oldest), nearest vocabulary."""
    entries = [entry for entry in table if (entry.pass_name, entry.dtype_bytes) == (pass_name, dtype_bytes)]
    architectures = {entry.architecture for entry in entries}
    known = max((a for a in architectures if a <= architecture), default=min(architectures))
    entry = min(
        (entry for entry in entries if entry.architecture == known),
        key=lambda entry: max(entry.vocab_size, vocab_size) / min(entry.vocab_size, vocab_size),
    )
    return fit_to_vocabulary(LaunchConfig(entry.tile, entry.num_warps), vocab_size)


def fit_to_vocabulary(config: LaunchConfig, vocab_size: int) -> LaunchConfig:
    """Shrink the tile to the vocabulary's size, and the warps with it."""
    tile = min(config.tile, max(16, 1 << (vocab_size - 1).bit_length()))
    return LaunchConfig(tile, max(1, config.num_warps * tile // config.tile))


def padded_width(vocab_size: int) -> int:
    """Return the columns to allocate per row of logits so that rows are aligned to 128 bytes and loads are wide."""
    return -(-vocab_size // 64) * 64


def tile_constants(config: LaunchConfig, alignment: int, dtype_bytes: int) -> dict[str, int]:
    """Return the kernel's arguments that distribute a tile over threads.

    Rows aligned to a widest access are loaded with it, and a thread's group is the columns of one load. Other rows
    are loaded ``alignment`` logits at a time, adjacent columns by adjacent threads, and a group is the columns of all
    loads of a thread. A wider group would span threads, which would then wait for each other at every tile.
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
