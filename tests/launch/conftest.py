"""Makes ``launcher`` and ``jobs`` importable; fixtures that several files use."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from refusals import Inputs, Refused
    from training import Training

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> Path:
    """The finished run of the training of ``jobs`` on two ranks of this machine, started by ``deepspeed``."""
    from jobs import cpu_environment, finish, start, training
    from launcher import DEEPSPEED, ROOT, free_port

    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = training(tiny_teacher_dir, small_corpus_dir, folder / "run")
    launcher = [DEEPSPEED, "--num_gpus", 2, "--master_port", free_port(), ROOT / "launch" / "train.py"]
    status, _, errors = finish(start([*launcher, *arguments], cpu_environment(), folder))
    assert status == 0, errors[-3000:]
    return folder / "run"


@pytest.fixture
def training(tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path) -> "Training":
    from training import Training

    return Training(tiny_teacher_dir, small_corpus_dir, tmp_path / "run")


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> Path:
    """The uninterrupted run of :class:`Training`."""
    from training import Training

    training = Training(tiny_teacher_dir, small_corpus_dir, tmp_path_factory.mktemp("uninterrupted") / "run")
    training.finish()
    return training.run


@pytest.fixture
def inputs(tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path) -> "Inputs":
    from refusals import Inputs

    return Inputs(tmp_path, tiny_teacher_dir, small_corpus_dir)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> "Refused":
    """Return a function that runs the command and returns its one line, which must come before any training."""
    from refusals import refusal

    monkeypatch.setattr(
        "distilspeed.trainer.training.loop.train", lambda run: pytest.fail("the training started")
    )
    return lambda arguments: refusal("train.py", arguments, tmp_path, monkeypatch, capfd)
