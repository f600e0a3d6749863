"""The wheel trains without a checkout."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from launcher import ROOT, environment, free_port

pytestmark = pytest.mark.full

PACKAGE = ("distilspeed", "ds_configs", "kernels", "launch", "trainer")


def run(*command: object, folder: Path) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and the checkout's packages, without the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    # Built from a copy, because setuptools creates a folder build/ beside setup.py.
    parts = ("setup.py", "pyproject.toml", "README.md", "LICENSE", *PACKAGE)
    run("cp", "-a", *(ROOT / part for part in parts), "source", folder=folder)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, "./source", folder=folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 1e6, "it holds the quickstart's model"
    venv.create(folder / "environment")
    python = folder / "environment" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", wheel, folder=folder)
    # Python searches a folder named in a .pth file, but does not read that folder's own .pth files (the checkout's).
    packages = sysconfig.get_path("purelib")
    (own,) = (folder / "environment" / "lib").glob("python*/site-packages")
    (own / "checkout.pth").write_text(f"{packages}\n")
    return python


def test_the_wheel_trains_from_an_empty_folder(
    installed: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    where = run(installed, "-c", "import distilspeed; print(distilspeed.__path__[0])", folder=tmp_path)
    assert installed.parents[1] in Path(where.strip()).parents
    options = {
        "--deepspeed_config": "cpu",
        "--teacher": tiny_teacher_dir,
        "--data_dir": small_corpus_dir,
        "--output_dir": tmp_path / "run",
        "--max_steps": 2,
    }
    launcher = [installed.with_name("distilspeed"), "train", "--master_port", free_port(), "--num_gpus", 1]
    run(*launcher, *(part for pair in options.items() for part in pair), folder=tmp_path)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
