"""Count the machine instructions of the loss kernel per pair of logits; needs no GPU.

    python -m distilspeed.kernels.profiling.instructions

compiles every pass with its launch of ``launch_configs.json`` for half-precision logits and prints a table. Triton's
wheel brings the assembler and the disassembler.

A pair is a student's and a teacher's logit of one column. The cost of a loop is the number of instructions from its
head to its branch back, divided by the pairs that its loads bring to a thread. The loops of ordinary rows are the
shortest ones that load logits: one without a store (the sums), one with a store (the gradient). Each has two ways:

- an unlabelled row takes the shortest way with two exponentials per pair;
- a labelled row takes the longest way, as if every tile held the label.

``loops`` weights them by the 15 % of the rows that are labelled. ``row`` adds what a thread executes once per row,
masked tile included, on the shortest way through the program that passes these loops.
"""

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from triton import knobs

from distilspeed.kernels.implementation.launch_configs import (
    WARP_THREADS,
    LaunchConfig,
    Pass,
    choose_entry,
    read_table,
)
from distilspeed.kernels.profiling.problem import LABELLED_FRACTION
from distilspeed.kernels.profiling.tuning import BERT_VOCAB_SIZE, compile_pass

ARCHITECTURES = (75, 80, 90)  # the disassembler of CUDA 13.1 refuses sm_70
DTYPE_BYTES = 2
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+([^;]*)")
LABEL = re.compile(r"(\.L_x_\w+):")
# The assembler leaves some loops by a call of the label after them.
BRANCH = re.compile(r"(?:@!?U?P\w+ +)?(?:BRA|CALL)\S* +[^`]*`\((\.L_x_\w+)\)")
ENDS = re.compile(r"EXIT|RET|BRA(?!\.DIV)\S* +`")
LOAD = re.compile(r"\bLDG\.E(?P<modifiers>[.\w]*) ")
LOADED_BYTES = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Loop:
    """A loop that loads logits and contains no other loop; lengths are instructions per iteration."""

    head: int
    body: frozenset[int]
    pairs: int  # per thread and iteration
    stores: bool
    unlabelled: int
    labelled: int

    @property
    def kind(self) -> tuple[bool, float]:
        return self.stores, self.unlabelled / self.pairs


@dataclass(frozen=True)
class Count:
    """Instructions per pair of logits of one pass, as this module's docstring defines them."""

    pass_name: Pass
    architecture: int
    config: LaunchConfig
    registers: int
    spilled_bytes: int
    unlabelled: float
    labelled: float
    row: float

    @property
    def loops(self) -> float:
        return (1 - LABELLED_FRACTION) * self.unlabelled + LABELLED_FRACTION * self.labelled


def count_instructions(
    pass_name: Pass, architecture: int, config: LaunchConfig, vocab_size: int = BERT_VOCAB_SIZE
) -> Count:
    """Compile one pass for labels and a mask at temperature 2, and count.

    Raises:
        RuntimeError: there is no disassembler.
    """
    compiled = compile_pass(pass_name, architecture, DTYPE_BYTES, config, vocab_size=vocab_size)
    program = Program(disassemble(compiled.cubin))
    loops = program.ordinary_loops(DTYPE_BYTES)
    unlabelled, labelled = (
        sum(getattr(loop, kind) / loop.pairs for loop in loops) for kind in ("unlabelled", "labelled")
    )
    pairs_of_thread = vocab_size / (WARP_THREADS * config.num_warps)
    whole_tiles = vocab_size // config.tile * config.tile / vocab_size
    return Count(
        pass_name,
        architecture,
        config,
        compiled.registers,
        compiled.spilled_bytes,
        unlabelled,
        labelled,
        row=whole_tiles * unlabelled + program.outside(loops) / pairs_of_thread,
    )


def disassembler() -> str:
    """Return the path of nvdisasm.

    Raises:
        RuntimeError: Triton has none, and the machine has none, either.
    """
    return knobs.nvidia.nvdisasm.path


def disassemble(cubin: bytes) -> str:
    """Return the machine code as text, branch targets as labels."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command: list[str | Path] = [disassembler(), "-c", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Program:
    """Instructions in the order of their addresses, and for each the instructions that may follow."""

    def __init__(self, disassembly: str) -> None:
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in disassembly.splitlines():
            if match := LABEL.match(line):
                labels[match[1]] = len(self.instructions)
            elif match := INSTRUCTION.match(line):
                self.instructions.append(match[1].strip())
        self.next = [tuple(self._next(i, text, labels)) for i, text in enumerate(self.instructions)]

    @staticmethod
    def _next(position: int, text: str, labels: Mapping[str, int]) -> Iterator[int]:
        if branch := BRANCH.match(text):
            yield labels[branch[1]]
        if not ENDS.match(text):
            yield position + 1

    def ordinary_loops(self, itemsize: int) -> list[Loop]:
        """Return the cheapest loop without stores and the cheapest loop with stores, in the order of execution."""
        loops = sorted(self.loops(itemsize), key=lambda loop: loop.kind)
        return list({loop.stores: loop for loop in reversed(loops)}.values())[::-1]

    def loops(self, itemsize: int) -> Iterator[Loop]:
        """Yield the loops that load logits."""
        tails = defaultdict(list)
        for i, following in enumerate(self.next):
            for head in following:
                if head <= i:
                    tails[head].append(i)
        before = defaultdict(list)
        for i, following in enumerate(self.next):
            for after in following:
                before[after].append(i)
        for head, ends in tails.items():
            body = {head}
            waiting = list(ends)
            while waiting:
                i = waiting.pop()
                if i not in body:
                    body.add(i)
                    waiting += before[i]
            if 0 in body or any(other in body for other in tails if other != head):
                continue  # a jump back to a part of the program that was moved, or a loop of loops
            loads = [match["modifiers"] for i in body if (match := LOAD.search(self.instructions[i]))]
            pairs = sum(loaded_bytes(modifiers) for modifiers in loads) // (2 * itemsize)
            stores = any("STG" in self.instructions[i] for i in body)
            if pairs > 0:
                shortest, longest = self._ways(body, head, ends, 2 * pairs)
                yield Loop(head, frozenset(body), pairs, stores, shortest, longest)

    def _ways(self, body: set[int], head: int, tails: list[int], exponentials: int) -> tuple[int, int]:
        """Return the lengths of the shortest way with so many exponentials and of the longest way."""
        before: dict[int, set[int]] = {i: set() for i in body}
        for i in body:
            for after in self.next[i]:
                if after in body and after != head:
                    before[after].add(i)
        shortest: dict[int, dict[int, int]] = {}  # by instruction and exponentials so far
        longest: dict[int, int] = {}
        for i in TopologicalSorter(before).static_order():
            is_exponential = "MUFU.EX2" in self.instructions[i]
            ways = [way for b in before[i] for way in shortest[b].items()] or [(0, 0)]
            shortest[i] = {}
            for count, length in ways:
                new_count = min(exponentials, count + is_exponential)
                shortest[i][new_count] = min(length + 1, shortest[i].get(new_count, length + 1))
            longest[i] = 1 + max((longest[b] for b in before[i]), default=0)
        return min(shortest[tail][exponentials] for tail in tails), max(longest[tail] for tail in tails)

    def outside(self, loops: list[Loop]) -> int:
        """Return the instructions of the shortest way from the entry through all loops, without the loops' own."""
        starts, length = {0}, 0
        for loop in loops:
            length += self._distances(starts)[loop.head]
            starts = {after for i in loop.body for after in self.next[i] if after not in loop.body}
            if any("EXIT" in self.instructions[i] for i in loop.body):
                return length
        ends = self._distances(starts)
        return length + 1 + min(distance for i, distance in ends.items() if "EXIT" in self.instructions[i])

    def _distances(self, starts: set[int]) -> dict[int, int]:
        distances, wave = dict.fromkeys(starts, 0), list(starts)
        while wave:
            wave_after = []
            for i in wave:
                for after in self.next[i]:
                    if after not in distances:
                        distances[after] = distances[i] + 1
                        wave_after.append(after)
            wave = wave_after
        return distances


def loaded_bytes(modifiers: str) -> int:
    return next((LOADED_BYTES[part] for part in modifiers.split(".") if part in LOADED_BYTES), 4)


def table(counts: list[Count]) -> str:
    header = f"{'pass':17} {'GPU':6} {'tile':>5} {'warps':>5} {'registers':>9} {'spilled':>7}"
    header += f" {'unlabelled':>10} {'labelled':>8} {'loops':>6} {'row':>6}"
    return "\n".join(
        [
            header,
            *(
                f"{c.pass_name:17} sm_{c.architecture:<3} {c.config.tile:5} {c.config.num_warps:5} {c.registers:9}"
                f" {c.spilled_bytes:7} {c.unlabelled:10.1f} {c.labelled:8.1f} {c.loops:6.1f} {c.row:6.1f}"
                for c in counts
            ),
        ]
    )


def main() -> None:
    stored = read_table()
    print(
        table(
            [
                count_instructions(
                    pass_name,
                    architecture,
                    choose_entry(stored, pass_name, architecture, DTYPE_BYTES, BERT_VOCAB_SIZE),
                )
                for architecture in ARCHITECTURES
                for pass_name in get_args(Pass)
            ]
        )
    )


if __name__ == "__main__":
    main()
