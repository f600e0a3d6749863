"""The Triton kernels without a GPU: run by the interpreter, and compiled for common GPUs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from distilspeed.kernels.implementation.backend import INTERPRETED

triton = pytest.importorskip("triton")

from distilspeed.kernels.implementation.launch_configs import (  # noqa: E402
    TABLE_FILE,
    LaunchConfig,
    Pass,
    TableEntry,
    choose_entry,
    read_table,
    tile_constants,
)
from distilspeed.kernels.profiling import instructions, prediction, tuning  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
ORACLE_TESTS = (
    "tests/kernels/test_distillation_loss.py",
    "tests/kernels/test_distillation_loss_definition.py",
    "tests/kernels/test_weighted_distillation_loss.py",
    "tests/kernels/test_linear_distillation_loss.py",
)
PASSES = get_args(Pass)

compiled_kernels = pytest.mark.skipif(INTERPRETED, reason="the interpreter has replaced the compiler")


@compiled_kernels
@pytest.mark.parametrize(
    "tests", [ORACLE_TESTS[0], *(pytest.param(tests, marks=pytest.mark.full) for tests in ORACLE_TESTS[1:])]
)
def test_kernels_keep_every_promise_of_the_loss_under_the_interpreter(tests: str) -> None:
    # In a new process: Triton chooses between compiler and interpreter when it is imported.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-m", "not gpu", tests],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def entry_name(entry: TableEntry) -> str:
    return f"sm_{entry.architecture}-{entry.pass_name}-{8 * entry.dtype_bytes}bit"


def is_strong(entry: TableEntry) -> bool:
    """Return True for fp16 in one launch on V100 and Hopper, which needs the most registers."""
    return entry.architecture in (70, 90) and entry.dtype_bytes == 2 and entry.pass_name == "forward_backward"


@compiled_kernels
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry_name(entry), marks=() if is_strong(entry) else pytest.mark.full)
        for entry in read_table()
    ],
)
def test_chosen_launches_compile_to_the_figures_of_the_table(entry: TableEntry) -> None:
    compiled = tuning.compile_pass(
        entry.pass_name,
        entry.architecture,
        entry.dtype_bytes,
        LaunchConfig(entry.tile, entry.num_warps),
        vocab_size=entry.vocab_size,
    )
    assert compiled.spilled_bytes == entry.spilled_bytes == 0
    assert compiled.shared_bytes == entry.shared_bytes
    if triton.__version__ == json.loads(TABLE_FILE.read_text())["triton"]:
        assert compiled.registers == entry.registers
    assert_row_is_read_without_waiting(compiled.ptx)
    assert "ld.global.v4.b32" in compiled.ptx
    assert entry.pass_name == "forward" or "st.global.v4.b32" in compiled.ptx


@compiled_kernels
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(
    ("vocab_size", "load"),
    [(30522, "ld.global.b32"), pytest.param(50257, "ld.global.b16", marks=pytest.mark.full)],
)
def test_unpadded_rows_are_read_without_waiting_and_without_spills(
    pass_name: Pass, vocab_size: int, load: str
) -> None:
    config = choose_entry(read_table(), pass_name, 70, 2, vocab_size)
    compiled = tuning.compile_pass(pass_name, 70, 2, config, vocab_size=vocab_size, width=vocab_size)
    assert compiled.spilled_bytes == 0
    assert load in compiled.ptx  # as wide as the rows' alignment allows: 4 bytes, 2 bytes
    assert_row_is_read_without_waiting(compiled.ptx)


@compiled_kernels
def test_temperature_of_2_needs_one_exponential_for_both_softmaxes() -> None:
    config = LaunchConfig(1024, 4)
    at_2, at_others = (
        tuning.compile_pass("backward", 90, 2, config, temperature_is_2=at_2).ptx.count("ex2.approx")
        for at_2 in (True, False)
    )
    columns_of_thread, loops = 8, 3  # ordinary rows' whole tiles and masked tile, other rows
    assert at_others - at_2 == loops * columns_of_thread


# Instructions per pair of logits, 15 % of the rows labelled.
MOST_INSTRUCTIONS = {"forward": 19, "backward": 12, "forward_backward": 32}


@compiled_kernels
@pytest.mark.parametrize(
    ("pass_name", "architecture"),
    [
        pytest.param(name, architecture, marks=() if (name, architecture) == strong else pytest.mark.full)
        for strong in [("forward_backward", 90)]
        for name in PASSES
        for architecture in (80, 90)
    ],
)
def test_ordinary_rows_take_few_instructions(pass_name: Pass, architecture: int) -> None:
    try:
        instructions.disassembler()
    except RuntimeError as error:
        pytest.skip(f"no disassembler: {error}")
    config = choose_entry(read_table(), pass_name, architecture, 2, tuning.BERT_VOCAB_SIZE)
    count = instructions.count_instructions(pass_name, architecture, config)
    assert count.loops <= MOST_INSTRUCTIONS[pass_name]
    assert count.registers <= tuning.MAX_REGISTERS
    assert count.spilled_bytes == 0


DISASSEMBLY = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P1 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.64.EF R4, desc[UR4][R4.64] ;
        /*0040*/                   MUFU.EX2 R6, R2 ;
        /*0050*/              @!P2 BRA P4, `(.L_x_2) ;
        /*0060*/                   MUFU.EX2 R7, R3 ;
        /*0070*/                   MUFU.EX2 R8, R4 ;
        /*0080*/                   MUFU.EX2 R9, R5 ;
        /*0090*/               @P3 BRA `(.L_x_2) ;
        /*00a0*/                   FMUL R6, R6, R6 ;
        /*00b0*/                   FMUL R7, R7, R7 ;
.L_x_2:
        /*00c0*/               @P0 CALL.REL.NOINC `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00e0*/                   STG.E [R2.64], R6 ;
        /*00f0*/                   EXIT ;
"""


def test_instructions_are_counted_along_the_ways_through_a_loop() -> None:
    program = instructions.Program(DISASSEMBLY)
    (loop,) = program.ordinary_loops(itemsize=4)
    assert (loop.pairs, loop.stores) == (2, False)
    assert loop.unlabelled == 10  # with 4 exponentials for 2 pairs; the first branch would skip 3 of them
    assert loop.labelled == 12
    assert program.outside([loop]) == 4


def test_rows_in_flight_decide_what_the_cache_holds() -> None:
    rows, tiles = 20, 8
    everything = 2 * rows * tiles
    assert prediction.simulated_hits(rows, tiles, int(everything / tuning.CACHE_SHARE)) == 1
    assert prediction.simulated_hits(rows, tiles, everything) < 0.8  # rows that have ended are in the way
    assert prediction.simulated_hits(rows, tiles, everything // 100) == 0
    assert 0.1 < prediction.simulated_hits(rows, tiles, everything // 3) < 0.5


def assert_row_is_read_without_waiting(ptx: str) -> None:
    """Check that no thread waits for another inside a loop over tiles: no shuffle, no barrier."""
    loops = loop_bodies(ptx)
    assert any("ld.global" in body for body in loops)
    for body in loops:
        assert "shfl" not in body
        assert "bar.sync" not in body


def loop_bodies(ptx: str) -> list[str]:
    """Return the text between each label and a branch back to it."""
    lines = ptx.splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\$L__BB\w+):", line))}
    branches = ((i, re.search(r"\bbra\S*\s+(\$L__BB\w+)", line)) for i, line in enumerate(lines))
    return ["\n".join(lines[labels[match[1]] : i]) for i, match in branches if match and labels[match[1]] < i]


@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 4096, 30522, 50265, 50257, 119547, 250002])
@pytest.mark.parametrize("architecture", [0, 70, 75, 80, 86, 89, 90, 100, 120])
def test_every_vocabulary_has_a_launch_that_is_valid_for_triton(architecture: int, vocab_size: int) -> None:
    for pass_name in PASSES:
        for dtype_bytes in (2, 4):
            config = choose_entry(read_table(), pass_name, architecture, dtype_bytes, vocab_size)
            for alignment in (1, 2, 16 // dtype_bytes):
                constants = tile_constants(config, alignment, dtype_bytes)
                for size in (config.tile, config.num_warps, constants["GROUP"]):
                    assert size & (size - 1) == 0
                assert 1 <= constants["GROUP"] <= config.tile <= max(16, 2 * vocab_size)
            assert config.num_warps * 32 <= 1024


def test_entry_of_the_nearest_architecture_and_vocabulary_is_used() -> None:
    table = [
        TableEntry(80, 2, "forward", 30522, 1024, 4, 0, 0, 0, ""),
        TableEntry(80, 2, "forward", 250002, 2048, 4, 0, 0, 0, ""),
        TableEntry(90, 2, "forward", 30522, 4096, 8, 0, 0, 0, ""),
        TableEntry(90, 4, "forward", 30522, 512, 1, 0, 0, 0, ""),
    ]
    assert choose_entry(table, "forward", 89, 2, 50257).tile == 1024
    assert choose_entry(table, "forward", 86, 2, 119547).tile == 2048
    assert choose_entry(table, "forward", 120, 2, 30522).tile == 4096
    assert choose_entry(table, "forward", 70, 2, 30522).tile == 1024
    assert choose_entry(table, "forward", 90, 4, 30522).tile == 512


def test_table_without_a_gpu_is_made_by_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few_registers, spilling, many_registers = (LaunchConfig(tile, 4) for tile in (1024, 2048, 4096))
    compiled = {
        few_registers: tuning.CompiledPass(few_registers, 64, 0, 16, ""),  # 8 programs of 1024 columns
        spilling: tuning.CompiledPass(spilling, 64, 8, 16, ""),
        many_registers: tuning.CompiledPass(
            many_registers, 255, 0, 16, ""
        ),  # 2 programs of 4096 columns, fewer on average
    }
    monkeypatch.setattr(tuning, "compile_pass", lambda *arguments, vocab_size: compiled[arguments[-1]])
    monkeypatch.setattr(tuning, "CANDIDATES", tuple(compiled))
    monkeypatch.setattr(tuning, "ARCHITECTURES", (80, 90))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    timed = TableEntry(90, 2, "forward", 30522, 2048, 4, 80, 0, 16, "300 us")
    outdated = replace(timed, architecture=80, chosen_by=tuning.BY_COMPILER)
    monkeypatch.setattr(tuning, "read_table", lambda: (timed, outdated))

    file = tmp_path / "table.json"
    file.write_text(tuning.table_as_json(tuning.make_table()))
    table = read_table(file)
    assert [entry for entry in table if entry.architecture == 90] == [timed]
    of_80 = [entry for entry in table if entry.architecture == 80]
    assert len(of_80) == len(PASSES) * 2
    assert {(entry.tile, entry.registers, entry.chosen_by) for entry in of_80} == {(1024, 64, "compiler")}


def test_single_launch_keeps_so_few_rows_in_flight_that_the_cache_holds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many_rows, few_rows = LaunchConfig(1024, 4), LaunchConfig(4096, 16)  # 8 and 2 per multiprocessor
    monkeypatch.setattr(
        tuning, "compile_pass", lambda *arguments, **_: tuning.CompiledPass(arguments[-1], 64, 0, 16, "")
    )
    monkeypatch.setattr(tuning, "CANDIDATES", (many_rows, few_rows, LaunchConfig(8192, 32)))

    def chosen(pass_name: Pass, architecture: int) -> LaunchConfig:
        entry = tuning.choose_by_compiler(pass_name, architecture, 2, 30522)
        return LaunchConfig(entry.tile, entry.num_warps)

    assert chosen("forward_backward", 90) == few_rows
    assert chosen("forward_backward", 80) == few_rows
    assert chosen("forward_backward", 70) == many_rows  # 6 MiB hold no row per multiprocessor
    assert chosen("forward", 90) == chosen("backward", 90) == many_rows


def test_launches_with_more_registers_are_chosen_only_if_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registers = {LaunchConfig(1024, 2): 80, LaunchConfig(1024, 4): 64}
    monkeypatch.setattr(
        tuning,
        "compile_pass",
        lambda *arguments, **_: tuning.CompiledPass(arguments[-1], registers[arguments[-1]], 0, 16, ""),
    )
    monkeypatch.setattr(tuning, "CANDIDATES", tuple(registers))
    assert tuning.choose_by_compiler("forward", 90, 2, 30522).num_warps == 4
    monkeypatch.setattr(tuning, "CANDIDATES", (LaunchConfig(1024, 2),))
    assert tuning.choose_by_compiler("forward", 90, 2, 30522).num_warps == 2
