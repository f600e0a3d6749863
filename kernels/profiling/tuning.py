"""Make ``launch_configs.json``: compile every candidate launch, and time it if the machine has the GPU.

Without the GPU, choose by the compiler's figures. Candidates that spill, or use more than ``MAX_REGISTERS``, are
dropped. The best one keeps the most bytes of logits in flight on a multiprocessor, because the kernel mostly waits for
memory. Ties go to more threads, then to the smaller tile.

A single launch (``forward_backward``) reads each row twice. The second reading comes from the second-level cache only
if the rows in flight fit into it, so here the best candidate is chosen among those whose rows in flight take at most
``CACHE_SHARE`` of the cache. Where no candidate does, as on a V100, rows are read from memory twice, and the launch is
chosen as for the other passes.
"""

import itertools
import json
import math
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from distilspeed.kernels.implementation.distillation_loss_kernel import distillation_loss_kernel
from distilspeed.kernels.implementation.distillation_loss_rows import LossRows
from distilspeed.kernels.implementation.distillation_loss_triton import launch
from distilspeed.kernels.implementation.launch_configs import (
    ACCESS_BYTES,
    WARP_THREADS,
    LaunchConfig,
    Pass,
    TableEntry,
    padded_width,
    read_table,
    tile_constants,
)

# 8 or 16 columns per thread. 32 columns, which compile without spills, too, keep no more bytes in flight. 8192 columns
# are for single launches with few rows in flight; with 16 per thread, unpadded rows spill.
CANDIDATES = (
    *(LaunchConfig(tile, tile // (32 * columns)) for tile in (1024, 2048, 4096) for columns in (8, 16)),
    LaunchConfig(8192, 32),
)
MAX_REGISTERS = 64  # so that a multiprocessor holds half of the threads it can
BERT_VOCAB_SIZE = 30522
DTYPES = {2: torch.float16, 4: torch.float32}  # bfloat16 compiles to the same code except for the conversion
DTYPE_NAMES = {2: "fp16", 4: "fp32"}
BY_COMPILER = "compiler"
MIB = 2**20
REGISTERS_PER_MULTIPROCESSOR = 65536  # of every architecture below
REGISTER_GRANULARITY = 8  # registers are allocated to a thread in multiples of 8
# The rest of the cache holds rows that have ended: with rows in flight that fill it, a third of the second readings
# miss (prediction.simulated_hits).
CACHE_SHARE = 2 / 3


@dataclass(frozen=True)
class Multiprocessors:
    """What the GPUs of one compute capability have.

    Threads and programs from the CUDA C++ Programming Guide (technical specifications per compute capability), number
    and cache from the data sheet of the GPU in the comment.
    """

    resident_threads: int
    resident_programs: int
    number: int
    cache_bytes: int  # second level


HARDWARE = {
    70: Multiprocessors(2048, 32, 80, 6 * MIB),  # V100
    75: Multiprocessors(1024, 16, 40, 4 * MIB),  # T4
    80: Multiprocessors(2048, 32, 108, 40 * MIB),  # A100
    86: Multiprocessors(1536, 16, 72, 6 * MIB),  # A10
    90: Multiprocessors(2048, 32, 132, 50 * MIB),  # H100 and H200
    100: Multiprocessors(2048, 32, 148, 126 * MIB),  # B200
}
ARCHITECTURES = tuple(HARDWARE)


@dataclass(frozen=True)
class CompiledPass:
    """The compiler's figures for one pass."""

    config: LaunchConfig
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes = b""


def compile_pass(
    pass_name: Pass,
    architecture: int,
    dtype_bytes: int,
    config: LaunchConfig,
    *,
    vocab_size: int = BERT_VOCAB_SIZE,
    width: int | None = None,
    temperature_is_2: bool = True,
) -> CompiledPass:
    """Compile one pass for labels, a mask and pointers aligned to 16 bytes; needs no GPU.

    ``width`` is the padded row; None: the next multiple of 64.
    """
    width = padded_width(vocab_size) if width is None else width
    constants = {
        "LOSSES": pass_name != "backward",
        "GRADIENT": pass_name != "forward",
        "VOCAB_SIZE": vocab_size,
        "WIDTH": width,
        "TEACHER_WIDTH": width,
        "HAS_LABELS": True,
        "HAS_MASK": True,
        "TEMPERATURE_IS_2": temperature_is_2,
        "EVICTION": "evict_first",
    } | tile_constants(config, math.gcd(width, ACCESS_BYTES // dtype_bytes), dtype_bytes)
    types = dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("student_ptr", "teacher_ptr", "gradient_ptr"), f"*{DTYPE_NAMES[dtype_bytes]}")
    types |= {"labels_ptr": "*i64", "soft_mask_ptr": "*i1", "inverse_temperature": "fp32"}
    signature, attributes = {}, {}
    for position, name in enumerate(distillation_loss_kernel.arg_names):
        is_pointer = name.endswith("_ptr")
        signature[name] = types.get(name, "*fp32" if is_pointer else "i32")
        if is_pointer or (name.endswith("_stride") and width % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(distillation_loss_kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, WARP_THREADS),
        options={"num_warps": config.num_warps, "enable_fp_fusion": True},
    )
    registers, spilled_bytes = assemble(compiled.asm["ptx"], architecture)
    return CompiledPass(
        config,
        registers,
        spilled_bytes,
        compiled.metadata.shared,
        compiled.asm["ptx"],
        compiled.asm["cubin"],
    )


def assemble(ptx: str, architecture: int) -> tuple[int, int]:
    """Return registers and spilled bytes per thread, from the assembler that Triton ships."""
    target = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [
            get_ptxas(architecture).path,
            "-v",
            f"--gpu-name={target}",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.findall(r"Used (\d+) registers", report)[0]
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(registers), sum(map(int, spills))


def make_table(vocab_size: int = BERT_VOCAB_SIZE, measured_rows: int = 8192) -> list[TableEntry]:
    """Return entries for every architecture: timed for this machine's GPU, by the compiler for the others.

    Entries of the present table that were timed on other architectures, or for other vocabularies, are kept.
    """
    here = None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        here = 10 * major + minor
    kept = [
        entry
        for entry in read_table()
        if entry.chosen_by != BY_COMPILER and (entry.architecture, entry.vocab_size) != (here, vocab_size)
    ]
    timed = {entry.architecture for entry in kept} | {here}
    entries = list(kept)
    for architecture, dtype_bytes, pass_name in itertools.product(
        sorted({*ARCHITECTURES, *filter(None, [here])}), DTYPES, get_args(Pass)
    ):
        if architecture == here:
            entries.append(choose_by_time(pass_name, architecture, dtype_bytes, vocab_size, measured_rows))
        elif architecture not in timed:
            entries.append(choose_by_compiler(pass_name, architecture, dtype_bytes, vocab_size))
    return sorted(entries, key=lambda e: (e.architecture, e.dtype_bytes, e.vocab_size, e.pass_name))


def table_as_json(entries: list[TableEntry]) -> str:
    """Return the content of ``launch_configs.json``, one entry per line."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    return f'{{"triton": "{triton.__version__}", "entries": [\n{lines}\n]}}\n'


def choose_by_compiler(pass_name: Pass, architecture: int, dtype_bytes: int, vocab_size: int) -> TableEntry:
    compiled = [
        compile_pass(pass_name, architecture, dtype_bytes, config, vocab_size=vocab_size)
        for config in CANDIDATES
    ]
    candidates = [each for each in compiled if each.spilled_bytes == 0]
    candidates = [each for each in candidates if each.registers <= MAX_REGISTERS] or candidates
    if pass_name == "forward_backward":
        row_bytes = 2 * padded_width(vocab_size) * dtype_bytes
        candidates = [each for each in candidates if rows_fit(each, architecture, row_bytes)] or candidates
    best = max(
        candidates,
        key=lambda candidate: (
            columns_in_flight(candidate, architecture, vocab_size),
            resident_programs(candidate, architecture) * candidate.config.num_warps,
            -candidate.config.tile,
        ),
    )
    return table_entry(pass_name, architecture, dtype_bytes, vocab_size, best, BY_COMPILER)


def choose_by_time(
    pass_name: Pass, architecture: int, dtype_bytes: int, vocab_size: int, num_rows: int
) -> TableEntry:
    """Return the fastest launch on the current CUDA device; all rows are soft, every seventh is labelled."""
    seconds = {
        config: median_time(pass_name, dtype_bytes, vocab_size, num_rows, config) for config in CANDIDATES
    }
    best = min(seconds, key=seconds.__getitem__)
    compiled = compile_pass(pass_name, architecture, dtype_bytes, best, vocab_size=vocab_size)
    chosen_by = f"{seconds[best]:.0f} us for {num_rows} rows on {torch.cuda.get_device_name()}"
    return table_entry(pass_name, architecture, dtype_bytes, vocab_size, compiled, chosen_by)


def median_time(
    pass_name: Pass, dtype_bytes: int, vocab_size: int, num_rows: int, config: LaunchConfig
) -> float:
    """Return the microseconds of one launch; caches are cleared before each."""
    width = padded_width(vocab_size)
    dtype = DTYPES[dtype_bytes]
    student, teacher = (torch.randn(num_rows, width, device="cuda", dtype=dtype) for _ in range(2))
    labels = torch.full((num_rows,), -100, device="cuda")
    labels[::7] = torch.arange(len(labels[::7]), device="cuda") % vocab_size
    soft_mask = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    rows = LossRows(student, teacher, labels, soft_mask, 2.0, -100, vocab_size)
    table = torch.ones(8, num_rows, device="cuda")
    coefficients, gradient = torch.ones(2, device="cuda"), torch.empty_like(student)
    return 1000 * triton.testing.do_bench(
        lambda: launch(pass_name, rows, table, coefficients, gradient, config), return_mode="median"
    )


def resident_programs(compiled: CompiledPass, architecture: int) -> int:
    """Return how many programs a multiprocessor holds at a time."""
    threads = compiled.config.num_warps * WARP_THREADS
    registers = -(-compiled.registers // REGISTER_GRANULARITY) * REGISTER_GRANULARITY
    return min(
        REGISTERS_PER_MULTIPROCESSOR // (registers * threads),
        HARDWARE[architecture].resident_threads // threads,
        HARDWARE[architecture].resident_programs,
    )


def columns_in_flight(compiled: CompiledPass, architecture: int, vocab_size: int) -> float:
    """Return the columns that the programs of a multiprocessor load at a time, on average over the tiles of a row."""
    return (
        resident_programs(compiled, architecture) * vocab_size / math.ceil(vocab_size / compiled.config.tile)
    )


def rows_fit(compiled: CompiledPass, architecture: int, row_bytes: int) -> bool:
    """Return True if the cache holds the rows in flight; ``row_bytes``: of both models' logits."""
    hardware = HARDWARE[architecture]
    rows = resident_programs(compiled, architecture) * hardware.number
    return rows * row_bytes <= CACHE_SHARE * hardware.cache_bytes


def table_entry(
    pass_name: Pass,
    architecture: int,
    dtype_bytes: int,
    vocab_size: int,
    compiled: CompiledPass,
    chosen_by: str,
) -> TableEntry:
    return TableEntry(
        architecture,
        dtype_bytes,
        pass_name,
        vocab_size,
        *compiled.config,
        compiled.registers,
        compiled.spilled_bytes,
        compiled.shared_bytes,
        chosen_by,
    )
