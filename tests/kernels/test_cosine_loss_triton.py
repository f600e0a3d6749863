"""The cosine loss's Triton kernels without a GPU: run by the interpreter, and compiled for common GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distilspeed.kernels.implementation.backend import INTERPRETED

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from distilspeed.kernels.implementation import cosine_loss_triton as kernels  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
V100, T4, A100, RTX_3090, H100, B200 = 70, 75, 80, 86, 90, 100
CONSTANTS = {"EPS": 1e-8, "HAS_MASK": True}

compiled_kernels = pytest.mark.skipif(INTERPRETED, reason="the interpreter has replaced the compiler")


@compiled_kernels
def test_kernels_keep_every_promise_of_the_loss_under_the_interpreter() -> None:
    # In a new process: Triton chooses between compiler and interpreter when it is imported.
    oracle_tests = "tests/kernels/test_cosine_loss.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-m", "not gpu", oracle_tests],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def compile_kernel(kernel: Any, capability: int, dtype: str, hidden: int) -> str:
    """Return the PTX for contiguous rows aligned to 16 bytes."""
    tile, num_warps = kernels.cosine_launch_config(hidden)
    constants = {**CONSTANTS, "HIDDEN": hidden, "TILE": tile}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    hidden_states = ("student_ptr", "teacher_ptr", "gradient_ptr")
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(hidden_states, f"*{dtype}")
    types["mask_ptr"] = "*i1"
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or (name.endswith("_stride") and hidden % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )
    return compiled.asm["ptx"]


def spilled_bytes(ptx: str, capability: int, folder: Path) -> int:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    (architecture,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assembler = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}"]
    report = subprocess.run(
        [*assembler, source, "-o", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stderr
    counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert counts, report
    return sum(map(int, counts))


@compiled_kernels
@pytest.mark.parametrize("capability", [V100, T4, A100, RTX_3090, H100, B200])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_compile_with_wide_accesses_and_without_spills(
    direction: str, dtype: str, capability: int, tmp_path: Path
) -> None:
    kernel = kernels.forward_kernel if direction == "forward" else kernels.backward_kernel
    ptx = compile_kernel(kernel, capability, dtype, hidden=768)
    assert not re.search(r"ld\.global(?:\.v2)?\.b16", ptx)
    # A thread loads eight numbers of each of two rows, 16 bytes per load.
    assert ptx.count("ld.global.v4.b32") == (4 if dtype == "fp32" else 2)
    assert direction == "forward" or "st.global.v4.b32" in ptx
    assert spilled_bytes(ptx, capability, tmp_path) == 0


@compiled_kernels
@pytest.mark.parametrize("hidden", [3, 1024, 12288])
def test_kernels_compile_for_rows_narrower_and_wider_than_a_tile(hidden: int, tmp_path: Path) -> None:
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        assert spilled_bytes(compile_kernel(kernel, V100, "fp16", hidden), V100, tmp_path) == 0


@pytest.mark.parametrize("hidden", [0, 1, 5, 768, 1024, 4096, 12288])
def test_launch_configuration_is_valid_for_triton(hidden: int) -> None:
    tile, num_warps = kernels.cosine_launch_config(hidden)
    assert tile & (tile - 1) == 0
    assert num_warps & (num_warps - 1) == 0
    assert num_warps * 32 <= min(tile, 1024)
