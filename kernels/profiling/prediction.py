"""Predict how near the loss kernel comes to the memory floor on GPUs that are not at hand.

    python -m distilspeed.kernels.profiling.prediction

A launch takes at least the time of its memory traffic at the data sheet's bandwidth, and of its instructions at four
per multiprocessor and clock. The prediction is the larger of the two, as if nothing else delayed the launch.

Two launches read and write 5u bytes (u: one model's logits). A single launch reads and writes 3u, and rows that the
cache has lost once more: up to 5u. How many it loses follows from a simulated cache.
"""

import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import get_args

from distilspeed.kernels.implementation.launch_configs import (
    WARP_THREADS,
    LaunchConfig,
    Pass,
    choose_entry,
    padded_width,
    read_table,
)
from distilspeed.kernels.profiling.instructions import DTYPE_BYTES, count_instructions
from distilspeed.kernels.profiling.tuning import BERT_VOCAB_SIZE, HARDWARE, compile_pass, resident_programs

INSTRUCTIONS_PER_CLOCK = 4 * WARP_THREADS  # of one multiprocessor, all threads together
FORWARD, BACKWARD, SINGLE = 2, 3, 3  # least traffic in u
SEED = 0


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet; clock: the one of the sheet's FLOP/s."""

    name: str
    architecture: int
    ghz: float
    gb_per_s: float


CARDS = (
    Card("V100", 70, 1.53, 900),
    Card("A100 80 GB", 80, 1.41, 2039),
    Card("H100 SXM", 90, 1.98, 3350),
    Card("H200", 90, 1.98, 4800),
)
COUNTED_AS = {70: 75}  # the oldest architecture that the disassembler reads


@dataclass(frozen=True)
class Prediction:
    """Shares of the memory floor, of two launches (5u) and of a single launch in place (3u)."""

    card: Card
    hits: float  # share of a single launch's second readings that the cache serves
    traffic: float  # of a single launch, in u
    two_launches: float
    single_launch: float
    busy: float  # time of a single launch's instructions / time of its traffic


def predict(card: Card, vocab_size: int = BERT_VOCAB_SIZE) -> Prediction:
    """Predict for half-precision logits, the launches of ``launch_configs.json`` and 15 % of the rows labelled."""
    hits = cache_hits(card, launch_of("forward_backward", card, vocab_size), vocab_size)
    traffic = SINGLE + 2 * (1 - hits)
    forward, backward, single = (instruction_time(name, card, vocab_size) for name in get_args(Pass))
    two_launches = (FORWARD + BACKWARD) / (max(FORWARD, forward) + max(BACKWARD, backward))
    return Prediction(card, hits, traffic, two_launches, SINGLE / max(traffic, single), single / traffic)


def launch_of(pass_name: Pass, card: Card, vocab_size: int) -> LaunchConfig:
    return choose_entry(read_table(), pass_name, card.architecture, DTYPE_BYTES, vocab_size)


def instruction_time(pass_name: Pass, card: Card, vocab_size: int) -> float:
    """Return the time of a launch's instructions in units of the time that u bytes of traffic take."""
    count = count_instructions(
        pass_name,
        COUNTED_AS.get(card.architecture, card.architecture),
        launch_of(pass_name, card, vocab_size),
        vocab_size,
    )
    instructions_per_ns = HARDWARE[card.architecture].number * INSTRUCTIONS_PER_CLOCK * card.ghz
    return count.row / instructions_per_ns * card.gb_per_s / DTYPE_BYTES


def cache_hits(card: Card, config: LaunchConfig, vocab_size: int) -> float:
    """Return the share of a single launch's second readings that hit a cache which drops the least recently used."""
    compiled = compile_pass("forward_backward", card.architecture, DTYPE_BYTES, config, vocab_size=vocab_size)
    hardware = HARDWARE[card.architecture]
    tile_bytes = config.tile * DTYPE_BYTES
    row_bytes = padded_width(vocab_size) * DTYPE_BYTES
    row_tiles = math.ceil(row_bytes / tile_bytes)
    return simulated_hits(
        resident_programs(compiled, card.architecture) * hardware.number,
        row_tiles,
        cache_tiles=hardware.cache_bytes * row_tiles // row_bytes,
    )


def simulated_hits(rows_in_flight: int, row_tiles: int, cache_tiles: int) -> float:
    """Simulate rows that are read tile by tile, then backwards, both models' logits, all rows at the same pace.

    ``cache_tiles``: tiles of one model that the cache holds.
    """
    generator = random.Random(SEED)
    steps = [generator.randrange(2 * row_tiles) for _ in range(rows_in_flight)]
    rows = list(range(rows_in_flight))
    cache: OrderedDict[tuple[int, int, int], None] = OrderedDict()
    hits = readings = 0
    for _ in range(8 * row_tiles):  # four rows by each program; the first one fills the cache
        for program in range(rows_in_flight):
            is_second, tile = divmod(steps[program], row_tiles)
            tile = row_tiles - 1 - tile if is_second else tile
            for model in range(2):
                key = rows[program], model, tile
                if is_second and rows[program] >= rows_in_flight:
                    readings += 1
                    hits += key in cache
                cache[key] = None
                cache.move_to_end(key)
                if len(cache) > cache_tiles:
                    cache.popitem(last=False)
            steps[program] += 1
            if steps[program] == 2 * row_tiles:
                steps[program] = 0
                rows[program] += rows_in_flight
    return hits / readings


def main() -> None:
    print("predicted from the compiler's output; nothing here is measured")
    print(f"{'':11} {'cache hits':>10} {'traffic':>8} {'two launches':>13} {'single launch':>14} {'busy':>5}")
    for card in CARDS:
        of = predict(card)
        shares = f"{of.two_launches:13.0%} {of.single_launch:14.0%} {of.busy:5.0%}"
        print(f"{card.name:11} {of.hits:10.0%} {of.traffic:7.2f}u {shares}")


if __name__ == "__main__":
    main()
