"""Which checkpoint a run resumes from, and what happens to damaged ones; DeepSpeed's files are random bytes."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from deepspeed.runtime import lr_schedules
from user_errors import raises_user_error

from distilspeed.trainer.engine import checkpoint as checkpoint_module
from distilspeed.trainer.engine.checkpoint import Checkpoint, Checkpoints, Progress, _own_settings
from distilspeed.trainer.files import FileRecord, write_text


class Engine:
    """A stub whose ``save_checkpoint`` writes the same files as DeepSpeed's engine."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        path = Path(folder) / tag
        path.mkdir(parents=True)
        (path / "mp_rank_00_model_states.pt").write_bytes(os.urandom(1000))
        (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(os.urandom(2000))
        script = Path(folder) / "zero_to_fp32.py"
        script.write_text("#!/usr/bin/env python\n")
        script.chmod(0o755)

    def zero_optimization(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects: None)


def saved(folder: Path, *steps: int, keep_last: int = 2, keep_every: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last, keep_every)
    for step in steps:
        checkpoints.save(Engine(), Progress(step, step + 1, 100 * step))  # type: ignore[arg-type]
    return checkpoints


def newest_step(checkpoints: Checkpoints) -> int:
    newest = checkpoints.newest_good()
    assert newest
    return newest.progress.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def test_the_newest_checkpoint_is_found_with_its_progress(tmp_path: Path) -> None:
    newest = saved(tmp_path, 3, 6).newest_good()
    assert newest
    assert newest.path == tmp_path / "step_000000006"
    assert newest.progress == Progress(6, 7, 600)
    assert newest.world_size == 1
    assert {file.path for file in newest.files} == {
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    }
    assert (tmp_path / "latest").read_text() == "step_000000006"


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "checkpoints", 2, None).newest_good() is None


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, *range(2, 22, 2), keep_last=2, keep_every=6)
    assert names(tmp_path) == [f"step_{step:09d}" for step in (6, 12, 18, 20)]


def test_no_saved_file_is_executable(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_mode & 0o111]


def truncate(path: Path) -> None:
    os.truncate(next(path.glob("*optim*")), 1999)


def alter(path: Path) -> None:
    file = next(path.glob("*optim*"))
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)


def remove_a_file(path: Path) -> None:
    next(path.glob("mp_rank*")).unlink()


def remove_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 200)


def add_a_pickle(path: Path) -> None:
    (path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"cos\nsystem\n")


def replace_a_file_with_a_link(path: Path) -> None:
    file = next(path.glob("mp_rank*"))
    moved = file.rename(path.parent / "elsewhere.pt")
    file.symlink_to(moved)


def replace_the_folder_with_a_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parent / f"elsewhere_{path.name}"))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    (alter, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    (remove_a_file, "mp_rank_00_model_states.pt"),
    (remove_the_manifest, "manifest.json"),
    (cut_the_manifest, "manifest.json"),
    (add_a_pickle, "zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    (replace_a_file_with_a_link, "mp_rank_00_model_states.pt"),
    (replace_the_folder_with_a_link, "link"),
]


@pytest.mark.parametrize(("spoil", "what"), DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_renamed_and_the_previous_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], what: str
) -> None:
    checkpoints = saved(tmp_path, 3, 6)
    spoil(tmp_path / "step_000000006")
    assert newest_step(checkpoints) == 3
    assert "step_000000006 is damaged: " in caplog.text
    assert what in caplog.text
    assert names(tmp_path) == ["step_000000003", "step_000000006.damaged"]
    saved(tmp_path, 6)  # the run reaches this step again
    assert newest_step(checkpoints) == 6


@pytest.mark.parametrize(("spoil", "what"), DAMAGES)
def test_if_all_checkpoints_are_damaged_it_is_an_error_and_nothing_changes(
    tmp_path: Path, spoil: Callable[[Path], None], what: str
) -> None:
    checkpoints = saved(tmp_path, 3, 6)
    for name in ("step_000000003", "step_000000006"):
        spoil(tmp_path / name)
    with raises_user_error("damaged-checkpoint", str(tmp_path), what):
        checkpoints.newest_good()
    assert names(tmp_path) == ["step_000000003", "step_000000006"]


@pytest.mark.parametrize("left", ["step_000000009.incomplete", "step_000000003.incomplete"])
def test_a_half_written_or_half_removed_folder_is_not_a_checkpoint(tmp_path: Path, left: str) -> None:
    checkpoints = saved(tmp_path, 3, 6)
    shutil.copytree(tmp_path / "step_000000006", tmp_path / left)
    assert newest_step(checkpoints) == 6
    saved(tmp_path, 9)
    assert names(tmp_path) == ["step_000000006", "step_000000009"]


def test_a_half_written_latest_file_does_no_harm(tmp_path: Path) -> None:
    saved(tmp_path, 3, 6)
    (tmp_path / ".latest.incomplete").write_text("step_0")
    assert newest_step(saved(tmp_path, 9)) == 9
    assert not (tmp_path / ".latest.incomplete").exists()


def test_a_checkpoint_of_another_format_is_refused_but_not_treated_as_damaged(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3, 6)
    manifest = tmp_path / "step_000000006" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with raises_user_error("unsupported-format", "step_000000006", "format 2"):
        checkpoints.newest_good()
    assert names(tmp_path) == ["step_000000003", "step_000000006"]


def test_a_checkpoint_without_the_states_of_every_rank_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with raises_user_error("unshared-output", "1 of 2 ranks", "--output_dir"):
        checkpoints.save(Engine(), Progress(6, 6, 600))  # type: ignore[arg-type]
    assert newest_step(checkpoints) == 3


def test_a_checkpoint_that_latest_does_not_name_yet_is_used(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3, 6)
    (tmp_path / "latest").write_text("step_000000003")  # killed after renaming, before updating latest
    assert newest_step(checkpoints) == 6


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:659]")],
)
def test_an_error_of_writing_is_a_user_error_and_leaves_earlier_checkpoints(
    tmp_path: Path, error: Exception
) -> None:
    class FullDisk(Engine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
            super().save_checkpoint(folder, tag, save_latest)
            raise error

    checkpoints = saved(tmp_path, 3, 6)
    with raises_user_error("unwritable-output", "step_000000009"):
        checkpoints.save(FullDisk(), Progress(9, 9, 900))  # type: ignore[arg-type]
    assert names(tmp_path) == ["step_000000003", "step_000000006"]
    assert (tmp_path / "latest").read_text() == "step_000000006"


def test_an_error_that_is_not_of_writing_is_not_converted(tmp_path: Path) -> None:
    class Lost(Engine):
        def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError, match="Connection closed"):
        Checkpoints(tmp_path, 2, None).save(Lost(), Progress(9, 9, 900))  # type: ignore[arg-type]


def test_too_little_memory_while_loading_is_not_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the job before still holds the GPU: the advice must not be to start over."""

    class Full(Engine):
        def load_universal_checkpoint(self) -> bool:
            return False

        def load_checkpoint(self, folder: str, tag: str) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(checkpoint_module, "_own_settings", lambda *_: contextlib.nullcontext())
    checkpoints = saved(tmp_path, 3)
    newest = checkpoints.newest_good()
    assert newest is not None
    with raises_user_error("out-of-memory"):
        checkpoints.load(Full(), newest)  # type: ignore[arg-type]


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "data.pt").write_bytes(b"some")
    checkpoint = Checkpoint(tmp_path, Progress(1, 2, 3), 4, (FileRecord.of(tmp_path, tmp_path / "data.pt"),))
    write_text(tmp_path / "manifest.json", checkpoint.to_json())
    assert Checkpoint.read(tmp_path) == checkpoint


# --- the settings of an engine that loads a checkpoint --------------------------------------------------


class Scheduled:
    """The parts of DeepSpeed's engine that hold settings, with real optimisers and schedules."""

    def __init__(self, kind: str, params: dict[str, Any], clipping: float, **of_adam: Any) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        self.basic_optimizer = self.optimizer = torch.optim.AdamW([weight], **of_adam)
        of_deepspeed = getattr(lr_schedules, kind, None)
        schedule = of_deepspeed or getattr(torch.optim.lr_scheduler, kind)
        self.lr_scheduler = schedule(self.basic_optimizer, **params)
        self.clipping = self.optimizer.clip_grad = clipping
        self.rates: list[float] = []

    def gradient_clipping(self) -> float:
        return self.clipping

    def train(self, steps: int) -> None:
        group = self.basic_optimizer.param_groups[0]
        for _ in range(steps):
            self.rates.append(float(group["lr"]))
            group["params"][0].grad = torch.ones(3)
            self.basic_optimizer.step()
            self.lr_scheduler.step()

    def load(self, saved: "Scheduled", steps: int) -> None:
        with _own_settings(self, steps):  # type: ignore[arg-type]
            self.basic_optimizer.load_state_dict(saved.basic_optimizer.state_dict())
            self.lr_scheduler.load_state_dict(saved.lr_scheduler.state_dict())
            self.optimizer.clip_grad = saved.optimizer.clip_grad


SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "WarmupLR": ({"warmup_max_lr": 1e-3, "warmup_num_steps": 4}, {"warmup_max_lr": 1e-4}),
    "WarmupDecayLR": (
        {"warmup_max_lr": 1e-3, "warmup_num_steps": 3, "total_num_steps": 20, "last_batch_iteration": 1},
        {"warmup_max_lr": 1e-4},
    ),
    "WarmupCosineLR": ({"warmup_num_steps": 3, "total_num_steps": 20}, {}),
    "OneCycle": (
        {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 6},
        {"cycle_max_lr": 5e-4},
    ),
    "LRRangeTest": (
        {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 2},
        {"lr_range_test_min_lr": 1e-4},
    ),
    "ExponentialLR": ({"gamma": 0.9}, {}),
    "StepLR": ({"step_size": 3}, {}),
    "MultiStepLR": ({"milestones": [2, 7, 11]}, {}),
    "CosineAnnealingLR": ({"T_max": 12, "eta_min": 1e-6}, {"eta_min": 1e-7}),
    "PolynomialLR": ({"total_iters": 20}, {}),
    "CyclicLR": (
        {"base_lr": 1e-4, "max_lr": 1e-3, "step_size_up": 3, "cycle_momentum": False},
        {"max_lr": 5e-4},
    ),
    "OneCycleLR": ({"max_lr": 1e-3, "total_steps": 20}, {"max_lr": 1e-4}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_changed_settings_resume_at_the_rate_they_would_have_reached_from_the_start(kind: str) -> None:
    params, changed = SCHEDULES[kind]
    first = Scheduled(kind, params, 1.0, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, eps=1e-6)
    first.train(8)
    new = {"lr": 1e-4, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-3}
    resumed, always = (Scheduled(kind, params | changed, 5.0, **new) for _ in range(2))
    resumed.load(first, 8)
    for engine, steps in ((resumed, 6), (always, 14)):
        engine.train(steps)
    assert resumed.rates == always.rates[8:]
    expected = always.basic_optimizer.param_groups[0]
    for name, value in resumed.basic_optimizer.param_groups[0].items():
        assert name == "params" or value == expected[name], name
    assert resumed.optimizer.clip_grad == 5.0


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_the_same_settings_resume_bit_for_bit(kind: str) -> None:
    straight, first, resumed = (Scheduled(kind, SCHEDULES[kind][0], 1.0, lr=1e-3, eps=1e-6) for _ in range(3))
    straight.train(14)
    first.train(8)
    resumed.load(first, 8)
    resumed.train(6)
    assert first.rates + resumed.rates == straight.rates
    assert resumed.basic_optimizer.param_groups[0].keys() == straight.basic_optimizer.param_groups[0].keys()
