"""If Triton cannot compile, a run fails at its start with a message that names what to install."""

import sysconfig
from pathlib import Path

import pytest
import torch
from triton.runtime import build
from user_errors import raises_user_error

from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.objective import kernel_check
from distilspeed.trainer.objective.kernel_check import check_kernels, run_losses
from distilspeed.trainer.training.checks import check_device

CUDA = torch.device("cuda", 0)


def test_the_losses_run_on_tiny_inputs(device: str) -> None:
    run_losses(torch.device(device))
    check_kernels(torch.device(device))


@pytest.fixture
def compiles_in_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make launching a kernel compile a C file that uses Python's headers, as Triton 3.6 does."""
    source = tmp_path / "launcher.c"
    source.write_text("#include <Python.h>\n")
    getattr(build._find_compiler, "cache_clear", lambda: None)()
    monkeypatch.setattr(
        kernel_check,
        "run_losses",
        lambda device: build._build("x", str(source), str(tmp_path), [], [], [], []),
    )


@pytest.mark.usefixtures("compiles_in_c")
@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PATH": ""}, ("gcc", "CC")),
        ({"CC": "/no/cc"}, ("/no/cc", "gcc")),
        ({"CC": "false"}, ("false",)),
    ],
)
def test_a_missing_compiler_is_reported(
    environment: dict[str, str], named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with raises_user_error("unusable-kernels", "cuda:0", *named):
        check_kernels(CUDA)


@pytest.mark.usefixtures("compiles_in_c")
def test_missing_python_headers_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "include")
    monkeypatch.setattr(sysconfig, "get_paths", lambda **scheme: {"include": nowhere})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: nowhere)
    with raises_user_error("unusable-kernels", f"{nowhere}/Python.h", "python3-dev"):
        check_kernels(CUDA)


@pytest.fixture
def failing_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(kernel_check, "run_losses", fail)


@pytest.mark.usefixtures("failing_losses")
def test_any_other_failure_is_reported_in_one_line() -> None:
    with raises_user_error("unusable-kernels", "no kernel image is available", "--debug"):
        check_kernels(CUDA)


@pytest.mark.usefixtures("failing_losses")
def test_every_run_is_checked_because_hard_labels_use_a_kernel_without_a_teacher_too() -> None:
    with raises_user_error("unusable-kernels", "cpu"):
        check_device(DeepSpeedConfig({}), torch.device("cpu"))
