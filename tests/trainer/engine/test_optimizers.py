"""Which implementation of Adam runs on which machine, and what a config with Lamb must satisfy."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from user_errors import raises_user_error

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine import optimizers
from distilspeed.trainer.engine.config import DeepSpeedConfig, ResolvedConfig
from distilspeed.trainer.engine.config_auto import resolve_deepspeed_config
from distilspeed.trainer.engine.config_check import check_deepspeed_config
from distilspeed.trainer.engine.optimizer_check import check_optimizer
from distilspeed.trainer.engine.optimizers import _obstacle, own_optimizer, settle_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def resolved(**sections: object) -> ResolvedConfig:
    return ResolvedConfig(sections, BatchEquation(1, 1, 1, 1))


def adam(zero: dict[str, Any] | None = None, **params: object) -> ResolvedConfig:
    return resolved(optimizer={"type": "AdamW", "params": params}, zero_optimization=zero or {"stage": 1})


def params_of(config: ResolvedConfig) -> Mapping[str, Any]:
    assert config.optimizer
    return config.optimizer.params


@pytest.fixture
def alone() -> Iterator[None]:
    """Join a job with this process as its only rank."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, alone: None) -> list[str]:
    """The names of DeepSpeed's operators that were loaded; on this simulated machine every one can be."""
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
    chosen = settle_optimizer(adam(zero, lr=1.0, torch_adam="auto", fused="auto"), device, 0)
    assert params_of(chosen) == {"lr": 1.0} | expected
    assert loaded == operators


@pytest.mark.usefixtures("alone")
def test_torchs_fused_adam_is_used_if_deepspeeds_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="distilspeed")
    config = adam(torch_adam="auto", fused="auto")
    fused_torch = {"torch_adam": True, "fused": True}
    monkeypatch.setattr(optimizers, "CUDA_HOME", None)  # no CUDA toolkit
    assert params_of(settle_optimizer(config, CUDA, 0)) == fused_torch
    assert "no compiler" in caplog.messages[-1]

    def fail(builder: optimizers.OpBuilder) -> None:
        raise RuntimeError("CUDA 13.0 does not go with torch's 12.8\nmore lines")

    monkeypatch.setattr(optimizers, "installed_ops", {"fused_adam": True})
    monkeypatch.setattr(optimizers.FusedAdamBuilder, "load", fail)
    assert params_of(settle_optimizer(config, CUDA, 0)) == fused_torch
    assert "more lines" not in caplog.messages[-1]
    with raises_user_error("failed-build", "fused_adam", "rank 0", "CUDA 13", '"torch_adam": "auto"'):
        settle_optimizer(adam(torch_adam=False), CUDA, 0)


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The lock of a build of fused_adam, on a machine that can build it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(optimizers, "is_ninja_available", lambda: True)
    monkeypatch.setattr(optimizers, "SECONDS_BETWEEN_LOOKS", 0.01)
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def test_the_lock_of_a_killed_build_is_named(lock: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    with raises_user_error("failed-build", str(lock), "60 minutes"):
        _obstacle(optimizers.FusedAdamBuilder(), "nvcc")


def test_a_build_of_another_process_is_awaited(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="distilspeed")
    looks: list[float] = []
    monkeypatch.setattr(
        time, "sleep", lambda seconds: looks.append(seconds) or (len(looks) == 3 and lock.unlink())
    )
    monkeypatch.setattr(optimizers.FusedAdamBuilder, "load", lambda builder: None)
    assert _obstacle(optimizers.FusedAdamBuilder(), "nvcc") == ""
    assert len(looks) == 3
    (message,) = caplog.messages
    assert f"if none is running, delete {lock}" in message


def test_a_stated_choice_is_kept(loaded: list[str]) -> None:
    for stated in ({"torch_adam": True}, {"torch_adam": True, "fused": False}):
        assert params_of(settle_optimizer(adam(**stated), CUDA, 0)) == stated
    assert not loaded
    for stated in ({}, {"torch_adam": False}):
        assert params_of(settle_optimizer(adam(**stated, fused="auto"), CUDA, 0)) == stated
    assert loaded == ["fused_adam"] * 2
    assert settle_optimizer(resolved(), CPU, 0) == resolved()


def test_the_choice_of_adam_stays_auto_until_the_ranks_have_joined() -> None:
    config = adam(lr="auto", torch_adam="auto", fused="auto")
    filled = resolve_deepspeed_config(config, config.batch, 10, learning_rate=1.0)
    assert params_of(filled) == {"lr": 1.0, "torch_adam": "auto", "fused": "auto"}
    check_deepspeed_config(filled, 10)
    sgd = resolved(optimizer={"type": "SGD", "params": {"lr": 1.0, "fused": "auto"}})
    with raises_user_error("bad-config", '"auto"', '"optimizer.params.fused"'):
        resolve_deepspeed_config(sgd, sgd.batch, 10, None)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_is_refused_with_zero(stage: int) -> None:
    config = DeepSpeedConfig({"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": stage}})
    with raises_user_error("conflicting-config", "Lamb", f"stage {stage}", '"stage": 0'):
        check_optimizer(config)


def test_deepspeed_creates_the_other_optimizers() -> None:
    assert own_optimizer(adam(), "cpu") is None
    assert own_optimizer(resolved(), "cpu") is None
