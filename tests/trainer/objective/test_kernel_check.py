"""Where Triton cannot compile, a run ends at its start, and its line says what to install."""

import sysconfig
from pathlib import Path

import pytest
import torch
from triton.runtime import build

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.objective import kernel_check
from distilspeed.trainer.objective.kernel_check import check_kernels, run_losses

CUDA = torch.device("cuda", 0)


def test_the_losses_run_in_small(device: str) -> None:
    run_losses(torch.device(device))
    check_kernels(torch.device(device))


@pytest.fixture
def compiles_in_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Launching a kernel compiles a C file that uses Python, as Triton 3.6 does."""
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
    ("environment", "said"),
    [
        ({"PATH": ""}, "finds no C compiler; install gcc, or name a C compiler in CC"),
        ({"CC": "/no/cc"}, "there is no /no/cc, which Triton compiles with; install gcc"),
        ({"CC": "false"}, "false, with which Triton compiles, has failed; see"),
    ],
)
def test_without_a_compiler_the_line_says_what_to_install(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=f"^the loss kernels cannot run on cuda:0: .*{said}"):
        check_kernels(CUDA)


@pytest.mark.usefixtures("compiles_in_c")
def test_without_pythons_headers_the_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "include")
    monkeypatch.setattr(sysconfig, "get_paths", lambda **scheme: {"include": nowhere})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: nowhere)
    with pytest.raises(UserError, match=rf"no {nowhere}/Python.h; install them \(python3-dev\)"):
        check_kernels(CUDA)


def test_what_else_goes_wrong_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(kernel_check, "run_losses", fail)
    with pytest.raises(UserError, match="no kernel image is available; see --debug"):
        check_kernels(CUDA)
