"""--push_to_hub uploads the finished student; a failed upload leaves the run as it is."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub import TOKEN, Hub, running_hub
from launcher import CPU_CONFIG, ROOT, deepspeed, error_lines, python
from refusals import refusal, snapshot
from user_errors import assert_names

REPOSITORY = "somebody/small-student"


@dataclass(frozen=True)
class Pushed:
    """A run of one step on two ranks whose student was uploaded."""

    arguments: list[object]
    run: Path
    hub: Hub
    result: subprocess.CompletedProcess[str]

    @property
    def student(self) -> dict[tuple[str, str], bytes]:
        """Return the files that the hub should have."""
        return {(REPOSITORY, path.name): path.read_bytes() for path in (self.run / "student").iterdir()}


@pytest.fixture(scope="module")
def pushed(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, small_corpus_dir: Path
) -> Iterator[Pushed]:
    run = tmp_path_factory.mktemp("pushed") / "run"
    arguments: list[object] = [ROOT / "launch" / "train.py", "--deepspeed_config", CPU_CONFIG]
    arguments += ["--teacher", tiny_teacher_dir, "--data_dir", small_corpus_dir, "--output_dir", run]
    arguments += ["--train_batch_size", 16, "--per_device_train_batch_size", 8]
    arguments += ["--max_steps", 1, "--push_to_hub", REPOSITORY]
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.environment", lambda device: environment(hub))
        yield Pushed(arguments, run, hub, deepspeed(*arguments, ranks=2))


def environment(hub: Hub) -> dict[str, str]:
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }


def test_the_student_is_uploaded_to_a_new_repository(pushed: Pushed) -> None:
    assert pushed.result.returncode == 0, pushed.result.stderr[-3000:]
    assert f"student uploaded to {pushed.hub.address}/{REPOSITORY}\n" in pushed.result.stdout
    assert pushed.hub.files == pushed.student
    assert {"model.safetensors", "README.md"} <= {name for _, name in pushed.student}


def test_a_complete_run_is_uploaded_again_on_resume(pushed: Pushed) -> None:
    pushed.hub.files.clear()
    before = snapshot(pushed.run)
    result = python(*pushed.arguments, "--resume")
    assert result.returncode == 0, result.stderr[-3000:]
    assert pushed.hub.files == pushed.student
    assert snapshot(pushed.run) == before


def test_a_failed_upload_names_the_student_and_how_to_upload_it(
    pushed: Pushed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushed.hub, "refuses", True)
    before = snapshot(pushed.run)
    result = python(*pushed.arguments, "--resume")
    assert result.returncode == 2
    (line,) = error_lines(result)
    student = pushed.run / "student"
    assert_names(line, "unusable-hub", "403", f"`hf upload {REPOSITORY} {student}`")
    assert snapshot(pushed.run) == before


@pytest.mark.parametrize(
    ("repository", "token", "offline", "shown"),
    [
        (REPOSITORY, None, False, "hf auth login"),
        (REPOSITORY, TOKEN, True, "HF_HUB_OFFLINE"),
        ("a/b/c", TOKEN, False, "OWNER/NAME"),
        ("small student", TOKEN, False, "OWNER/NAME"),
    ],
)
def test_an_upload_that_must_fail_is_refused_before_training(
    repository: str,
    token: str | None,
    offline: bool,
    shown: str,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "distilspeed.trainer.training.loop.train", lambda run: pytest.fail("the training started")
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", token or "")
    options = {"deepspeed_config": CPU_CONFIG, "teacher": tiny_teacher_dir, "data_dir": small_corpus_dir}
    options |= {"output_dir": tmp_path / "run", "push_to_hub": repository}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert shown in refusal("train.py", arguments, tmp_path, monkeypatch, capfd)
