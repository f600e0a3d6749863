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
    """The finished run of the training of ``jobs`` on two ranks of this machine."""
    from jobs import training
    from launcher import ROOT, ranks_alone

    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = training(tiny_teacher_dir, small_corpus_dir, folder / "run")
    result = ranks_alone(ROOT / "launch" / "train.py", *arguments, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
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
