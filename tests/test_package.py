"""What ``import distilspeed`` gives, and what it takes."""

import subprocess
import sys
from pathlib import Path

import distilspeed


def modules_after(statement: str, folder: Path) -> set[str]:
    """The top-level modules that a statement brings into a new Python."""
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_the_package_alone_takes_no_torch(tmp_path: Path) -> None:
    modules = modules_after("import distilspeed", tmp_path)
    assert "distilspeed" in modules
    assert not {"torch", "triton", "numpy"} & modules


def test_the_losses_take_torch_and_none_of_the_trainer(tmp_path: Path) -> None:
    modules = modules_after("from distilspeed import *", tmp_path)
    assert "torch" in modules
    assert not {"deepspeed", "transformers", "datasets", "pydantic"} & modules


def test_the_project_can_be_imported_under_its_own_name_alone(tmp_path: Path) -> None:
    # transformers takes a module called kernels for the package of that name on PyPI.
    found = "[find_spec(name) for name in ('kernels', 'trainer', 'launch')] == [None] * 3"
    modules_after(f"from importlib.util import find_spec; assert {found}", tmp_path)


def test_every_public_name_is_there() -> None:
    assert distilspeed.__version__
    for name in distilspeed.__all__:
        assert getattr(distilspeed, name) is not None
