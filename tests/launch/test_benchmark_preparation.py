"""The command launch/benchmark_preparation.py, on a text of a few pages."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer
from user_errors import assert_names

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "benchmark_preparation.py"
PATIENCE = 600.0  # seconds until a test gives up waiting


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_preparation", COMMAND)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def test_both_prepare_all_of_the_text(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    done = run(
        "--text",
        reference_text,
        "--tokenizer",
        small_tokenizer_dir,
        "--seq_length",
        512,
        "--rounds",
        1,
        "--output",
        output,
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(output.read_text())
    assert str(tmp_path.parent) not in output.read_text()
    [comparison] = result["comparisons"]
    assert comparison["text_bytes"] == reference_text.stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    lengths = [
        len(tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"]) + 2
        for line in reference_text.read_text(encoding="utf-8").splitlines()
    ]
    [original], [ours] = comparison["original"], comparison["ours"]
    assert original["tokens"] == sum(lengths)
    # Ours cuts to rows of 512, adds two special tokens to each piece, and drops pieces of up to eleven tokens.
    pieces = [min(510, length - 2 - start) + 2 for length in lengths for start in range(0, length - 2, 510)]
    assert ours["tokens"] == sum(piece for piece in pieces if piece > 11)
    assert comparison["ratio"] == pytest.approx(original["seconds"] / ours["seconds"])
    assert f"{original['tokens']:,}" in done.stdout


def test_ratios_compare_the_same_round(benchmark: ModuleType) -> None:
    def rounds(*seconds: float, of_counting: float) -> list[object]:
        return [benchmark.Round(one, of_counting, 1, 1, "") for one in seconds]

    # The second round was slow for both.
    compared = benchmark.Rounds(1, rounds(12, 60, 12, of_counting=2), rounds(2, 10, 4, of_counting=0))
    assert compared.ratio() == 6
    assert compared.ratio_without_counting() == 5


def test_memory_includes_all_processes_of_a_command(benchmark: ModuleType) -> None:
    grandchild = "held = bytearray(b'x') * (200 << 20); import time; time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    try:
        while benchmark._memory_of_tree(process.pid) < 200 << 20:
            assert time.monotonic() < deadline, "the processes did not start"
            time.sleep(0.05)
        assert benchmark._memory_of_tree(process.pid) < 260 << 20
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    done = run("--text", tmp_path / "nowhere.txt", "--tokenizer", "any")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert_names(line, "missing-file", str(tmp_path / "nowhere.txt"), "--text")
