"""The C++ kernels: rows of several blocks, threads, and their compilation at first use."""

import logging
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import get_cxx_compiler

from distilspeed.kernels.implementation import cpu_kernels, distillation_loss_chunked, distillation_loss_cpp
from distilspeed.kernels.implementation.backend import INTERPRETED
from distilspeed.kernels.implementation.distillation_loss_rows import LossRows
from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter runs instead"),
    pytest.mark.skipif(
        shutil.which(shlex.split(get_cxx_compiler())[0]) is None, reason="there is no C++ compiler"
    ),
]

ROWS = 12
COEFFICIENTS = torch.tensor([0.7, 1.3])
# The kernel converts and sums blocks of 1024 columns; vectors have 4, 8 or 16.
WIDTHS = (1, 15, 1024, 1025, 2500)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def loss_rows(width: int, dtype: torch.dtype, temperature: float) -> LossRows:
    """Return rows with every mixture of soft and hard, with a padded teacher, and labels in every block."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, ROWS, width + 3, generator=generator)
    labels = torch.randint(0, width, (ROWS,), generator=generator)
    labels[::3] = -100
    labels[1] = width - 1
    soft_mask = torch.arange(ROWS) % 4 > 0
    return LossRows(
        student[:, :width].to(dtype), teacher.to(dtype), labels, soft_mask, temperature, -100, width
    )


def in_float64(rows: LossRows) -> LossRows:
    return rows._replace(
        student_logits=rows.student_logits.double(), teacher_logits=rows.teacher_logits.double()
    )


def all_passes(implementation: object, rows: LossRows) -> dict[str, Tensor]:
    """Return losses and gradient of the two passes and of the single one."""
    coefficients = COEFFICIENTS.to(
        torch.float64 if rows.student_logits.dtype == torch.float64 else torch.float32
    )
    gradient, single = torch.empty_like(rows.student_logits), torch.empty_like(rows.student_logits)
    table = implementation.forward(rows)  # type: ignore[attr-defined]
    implementation.backward(rows, table, coefficients, gradient)  # type: ignore[attr-defined]
    losses = implementation.forward_backward(rows, coefficients, single)  # type: ignore[attr-defined]
    return {"table": table[:3], "gradient": gradient, "losses": losses, "single": single}


def assert_equal_to_float64(rows: LossRows) -> None:
    found, expected = (
        all_passes(distillation_loss_cpp, rows),
        all_passes(distillation_loss_chunked, in_float64(rows)),
    )
    rounding = ROUNDING[rows.student_logits.dtype]
    for name in found:
        is_loss = name in ("table", "losses")
        torch.testing.assert_close(
            found[name].double(),
            expected[name],
            rtol=1e-5 if is_loss else 2 * rounding,
            atol=2e-6 if is_loss else 1e-6,
            equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("temperature", [2.0, 1.0, 3.7])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_width_equal_float64(width: int, temperature: float, dtype: torch.dtype) -> None:
    assert_equal_to_float64(loss_rows(width, dtype, temperature))


@pytest.mark.parametrize("column", [0, 1023, 1024, 2499])
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 1e4, -1e4])
@pytest.mark.parametrize("model", ["student", "teacher", "both"])
def test_hostile_logits_equal_float64(model: str, value: float, column: int) -> None:
    rows = loss_rows(2500, torch.float32, 2.0)
    if model != "teacher":
        rows.student_logits[5:, column] = value
    if model != "student":
        rows.teacher_logits[5:, column] = value
    assert_equal_to_float64(rows)


def test_rows_of_minus_infinity_are_undefined_and_do_not_touch_their_neighbours() -> None:
    rows = loss_rows(2500, torch.float32, 2.0)
    rows.student_logits[5] = -torch.inf
    rows.teacher_logits[7] = -torch.inf
    assert_equal_to_float64(rows)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_results_do_not_depend_on_threads_and_may_overwrite_the_logits(dtype: torch.dtype) -> None:
    rows, threads = loss_rows(2500, dtype, 2.0), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_passes(distillation_loss_cpp, rows)
        torch.set_num_threads(3)
        together = all_passes(distillation_loss_cpp, rows)
    finally:
        torch.set_num_threads(threads)
    for name, values in alone.items():
        assert torch.equal(values, together[name]), name
    losses = distillation_loss_cpp.forward_backward(rows, COEFFICIENTS, rows.student_logits)
    assert torch.equal(losses, alone["losses"])
    assert torch.equal(rows.student_logits, alone["single"])


@pytest.fixture
def no_kernels_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that has compiled nothing; returns its folder of extensions."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    cpu_kernels.cpu_operators.cache_clear()
    yield tmp_path
    cpu_kernels.cpu_operators.cache_clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("compiler", ["no/such/compiler", "false", "g++ 'without an end", "/usr"])
def test_without_a_working_compiler_the_losses_run_in_pytorch_and_the_log_says_so_once(
    compiler: str,
    no_kernels_yet: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    student = torch.linspace(-1, 1, 64).view(2, 32).requires_grad_()
    for _ in range(2):
        weighted_distillation_loss(student, student.detach().flip(1)).loss.backward()
    assert student.grad is not None
    assert student.grad.count_nonzero() == student.numel()
    (message,) = warnings_of(caplog)
    assert "run in PyTorch" in message
    assert compiler in message
    assert not list(no_kernels_yet.glob("*/*.so"))


def test_an_empty_name_of_a_compiler_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    assert cpu_kernels._compiler() == ["c++"]


@pytest.mark.usefixtures("no_kernels_yet")
def test_a_folder_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/none")
    assert cpu_kernels.cpu_operators() is None
    (message,) = warnings_of(caplog)
    assert "/proc/none" in message
    assert "compiler" not in message


@pytest.mark.usefixtures("no_kernels_yet")
def test_other_processors_get_the_kernels_without_special_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    flags: list[str] = []
    monkeypatch.setattr(cpu_kernels, "_compile", lambda given, library: flags.extend(given))
    cpu_kernels.compiled_library()
    assert {flag for flag in flags if "CAPABILITY" in flag} == {
        "-DCPU_CAPABILITY=DEFAULT",
        "-DCPU_CAPABILITY_DEFAULT",
    }
    assert not [flag for flag in flags if flag.startswith("-m")]


@pytest.mark.usefixtures("no_kernels_yet")
def test_without_a_home_the_losses_run_in_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown_user(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert cpu_kernels.cpu_operators() is None
    (message,) = warnings_of(caplog)
    assert "home directory; set TORCH_EXTENSIONS_DIR" in message


def test_a_damaged_library_is_reported_with_the_reason(
    no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = no_kernels_yet / "damaged.so"
    damaged.write_text("no library")
    monkeypatch.setattr(cpu_kernels, "compiled_library", lambda: damaged)
    assert cpu_kernels.cpu_operators() is None
    (message,) = warnings_of(caplog)
    assert f"{damaged}: file too short" in message


def test_the_compiler_may_be_given_with_arguments(
    no_kernels_yet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "CXX", f"env MADE_BY=ccache {sys.executable} -c 'import sys; open(sys.argv[-1], \"w\")'"
    )
    assert cpu_kernels.compiled_library().is_relative_to(no_kernels_yet)


BUILD = "from distilspeed.kernels.implementation.cpu_kernels import compiled_library as c; print(c())"


def start_build(extensions: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.full
def test_a_killed_compilation_does_not_hold_up_the_next_and_two_at_once_compile_once(tmp_path: Path) -> None:
    killed = start_build(tmp_path)
    while not list(tmp_path.glob("*/*.lock")):
        assert killed.poll() is None, "it ended before it compiled"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.glob("*/*.so"))
    both = [start_build(tmp_path), start_build(tmp_path)]
    (library,) = {Path(process.communicate()[0].strip()) for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert library.exists()
    assert not list(tmp_path.glob("*/*.unfinished"))


MORE_THREADS = """
import torch
torch.set_num_threads(2)
from distilspeed.kernels.implementation import distillation_loss_chunked, distillation_loss_cpp
from distilspeed.kernels.implementation.distillation_loss_rows import LossRows

student, teacher = torch.randn(2, 64, 5000, generator=torch.Generator().manual_seed(0))
rows, coefficients = LossRows(student, teacher, None, None, 2.0, -100, 5000), torch.ones(2)
gradients = torch.zeros(2, 64, 5000)
for implementation, gradient in zip((distillation_loss_cpp, distillation_loss_chunked), gradients):
    implementation.forward_backward(rows, coefficients, gradient)
torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.full
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_a_compiler_may_have_another_openmp_library_with_more_threads(tmp_path: Path) -> None:
    own = {"CXX": "clang++", "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "8"}
    subprocess.run([sys.executable, "-c", MORE_THREADS], env=os.environ | own, check=True)
    assert list(tmp_path.glob("*/*.so"))
