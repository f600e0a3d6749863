"""The Triton kernels without a GPU: run by the interpreter, compiled for the cards people have."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distilspeed.kernels.backend import INTERPRETED

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from distilspeed.kernels import distillation_loss_triton as kernels  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
ORACLE_TESTS = (
    "tests/kernels/test_distillation_loss.py",
    "tests/kernels/test_distillation_loss_definition.py",
)
BERT_VOCAB_SIZE, PADDED_WIDTH = 30522, 30528
V100, A100, H100 = 70, 80, 90

compiled_kernels = pytest.mark.skipif(INTERPRETED, reason="the interpreter has replaced the compiler")


@compiled_kernels
def test_kernels_keep_every_promise_of_the_loss_under_the_interpreter() -> None:
    # A process of its own: Triton chooses between compiler and interpreter when it is imported.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-m", "not gpu", *ORACLE_TESTS],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def compile_kernel(kernel: Any, capability: int, dtype: str, width: int) -> Any:
    """Compile as a launch with 16-byte aligned pointers would."""
    config = kernels.launch_config(BERT_VOCAB_SIZE)
    constants = {
        "VOCAB_SIZE": BERT_VOCAB_SIZE,
        "WIDTH": width,
        "TILE": config.tile,
        "HAS_LABELS": True,
        "HAS_MASK": True,
    }
    logits = ("student_ptr", "teacher_ptr", "gradient_ptr")
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(logits, f"*{dtype}")
    types |= {
        "labels_ptr": "*i64",
        "soft_mask_ptr": "*i1",
        "ignore_index": "i32",
        "inverse_temperature": "fp32",
    }
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or (name.endswith("_stride") and width % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "enable_fp_fusion": True},
    )


def spilled_bytes(ptx: str, capability: int, folder: Path) -> int:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    (architecture,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    command = [
        get_ptxas(capability).path,
        "-v",
        f"--gpu-name={architecture}",
        source,
        "-o",
        folder / "kernel.cubin",
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))


@compiled_kernels
@pytest.mark.parametrize("capability", [V100, A100, H100])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernels_compile_with_wide_accesses_and_without_spills(
    direction: str, dtype: str, capability: int, tmp_path: Path
) -> None:
    kernel = kernels.forward_kernel if direction == "forward" else kernels.backward_kernel
    ptx = compile_kernel(kernel, capability, dtype, PADDED_WIDTH).asm["ptx"]
    assert "ld.global.v4.b32" in ptx
    assert direction == "forward" or "st.global.v4.b32" in ptx
    assert spilled_bytes(ptx, capability, tmp_path) == 0


@compiled_kernels
def test_kernels_compile_for_rows_that_are_not_padded(tmp_path: Path) -> None:
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        ptx = compile_kernel(kernel, V100, "fp16", BERT_VOCAB_SIZE).asm["ptx"]
        assert spilled_bytes(ptx, V100, tmp_path) == 0


@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 4096, 30522, 50265, 250002])
def test_launch_configuration_is_one_triton_accepts(vocab_size: int) -> None:
    tile, num_warps = kernels.launch_config(vocab_size)
    assert tile & (tile - 1) == 0
    assert num_warps & (num_warps - 1) == 0
    assert num_warps * 32 <= 1024
    assert tile <= 8192
