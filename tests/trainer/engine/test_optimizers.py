"""Which Adam runs where, and what a Lamb in the config must satisfy."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from user_errors import raises_user_error

from distilspeed.trainer.engine import optimizers
from distilspeed.trainer.engine.optimizers import (
    _obstacle,
    choose_optimizer,
    leave_choice_open,
    own_optimizer,
    settle_optimizer,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def adam(zero: dict[str, Any] | None = None, **params: object) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": zero or {"stage": 1}}


@pytest.fixture
def alone() -> Iterator[None]:
    """A job of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, alone: None) -> list[str]:
    """DeepSpeed's operators that were loaded; all of them can be, on this pretended machine."""
    names: list[str] = []
    monkeypatch.setattr(optimizers, "_obstacle", lambda builder, compiler: names.append(builder.name) or "")
    return names


@pytest.mark.parametrize(
    ("zero", "device", "expected", "operators"),
    [
        ({"stage": 1}, CPU, {"torch_adam": True, "fused": True}, []),
        (OFFLOAD, CPU, {"torch_adam": True, "fused": True}, []),  # nothing compiles for minutes on a CPU
        ({"stage": 1}, CUDA, {"torch_adam": False}, ["fused_adam"]),
        (OFFLOAD, CUDA, {"torch_adam": False}, ["cpu_adam"]),
        ({"stage": 3, "offload_optimizer": {"device": "none"}}, CUDA, {"torch_adam": False}, ["fused_adam"]),
    ],
)
def test_auto_is_the_fastest_adam_of_the_machine(
    loaded: list[str],
    zero: dict[str, Any],
    device: torch.device,
    expected: dict[str, bool],
    operators: list[str],
) -> None:
    chosen = settle_optimizer(adam(zero, lr="auto", torch_adam="auto", fused="auto"), device, 0)
    assert chosen["optimizer"]["params"] == {"lr": "auto"} | expected
    assert loaded == operators


@pytest.mark.usefixtures("alone")
def test_torchs_fused_adam_serves_where_deepspeeds_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adam(torch_adam="auto", fused="auto")
    fused_torch = {"torch_adam": True, "fused": True}
    monkeypatch.setattr(optimizers, "CUDA_HOME", None)  # no CUDA toolkit
    assert settle_optimizer(config, CUDA, 0)["optimizer"]["params"] == fused_torch
    assert "no compiler" in capsys.readouterr().out

    def fail(builder: optimizers.OpBuilder) -> None:
        raise RuntimeError("CUDA 13.0 does not go with torch's 12.8\nmore lines")

    monkeypatch.setattr(optimizers, "installed_ops", {"fused_adam": True})
    monkeypatch.setattr(optimizers.FusedAdamBuilder, "load", fail)
    assert settle_optimizer(config, CUDA, 0)["optimizer"]["params"] == fused_torch
    assert capsys.readouterr().out.count("\n") == 1
    with raises_user_error("failed-build", "fused_adam", "rank 0", "CUDA 13", '"torch_adam": "auto"'):
        settle_optimizer(adam(torch_adam=False), CUDA, 0)


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The lock of a build of fused_adam, which would be built here."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(optimizers, "is_ninja_available", lambda: True)
    monkeypatch.setattr(optimizers, "SECONDS_BETWEEN_LOOKS", 0.01)
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_the_lock_of_a_build_that_was_killed_is_named(lock: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    with raises_user_error("failed-build", str(lock), "60 minutes"):
        _obstacle(optimizers.FusedAdamBuilder(), "nvcc")


def test_the_build_of_another_process_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(
        time, "sleep", lambda seconds: looks.append(seconds) or (len(looks) == 3 and lock.unlink())
    )
    monkeypatch.setattr(optimizers.FusedAdamBuilder, "load", lambda builder: None)
    assert _obstacle(optimizers.FusedAdamBuilder(), "nvcc") == ""
    assert len(looks) == 3
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert f"if none runs, delete {lock}" in output


def test_a_stated_choice_is_kept(loaded: list[str]) -> None:
    for stated in ({"torch_adam": True}, {"torch_adam": True, "fused": False}):
        assert settle_optimizer(adam(**stated), CUDA, 0)["optimizer"]["params"] == stated
    assert not loaded
    for stated in ({}, {"torch_adam": False}):
        assert settle_optimizer(adam(**stated, fused="auto"), CUDA, 0)["optimizer"]["params"] == stated
    assert loaded == ["fused_adam"] * 2
    assert settle_optimizer({}, CPU, 0) == {}


def test_what_the_machine_decides_stays_open_until_the_ranks_have_joined() -> None:
    config = adam(lr="auto", betas="auto", torch_adam="auto", fused="auto")
    resolved = choose_optimizer(adam(lr=1.0, betas=[0, 1], torch_adam="auto", fused="auto"), CPU)
    assert resolved["optimizer"]["params"]["torch_adam"] is True
    assert leave_choice_open(resolved, config) == adam(lr=1.0, betas=[0, 1], torch_adam="auto", fused="auto")
    for stated in (adam(lr=1.0, torch_adam=False), {"optimizer": {"type": "Lamb", "params": {}}}, {}):
        assert leave_choice_open(stated, stated) == stated


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_is_refused_with_zero(stage: int) -> None:
    config = {"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": stage}}
    with raises_user_error("conflicting-config", "Lamb", f"stage {stage}", '"stage": 0'):
        choose_optimizer(config, CPU)


def test_deepspeed_makes_the_other_optimizers() -> None:
    assert own_optimizer(adam(), "cpu") is None
    assert own_optimizer({}, "cpu") is None
