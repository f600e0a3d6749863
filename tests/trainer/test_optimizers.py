"""Which Adam runs where, and what a Lamb in the config must satisfy."""

from typing import Any

import pytest
import torch

from distilspeed.trainer import optimizers
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.optimizers import choose_optimizer, own_optimizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def adam(zero: dict[str, Any] | None = None, **params: object) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": zero or {"stage": 1}}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """DeepSpeed's operators that were loaded; all of them can be, on this pretended machine."""
    names: list[str] = []

    def load(builder: optimizers.OpBuilder, compiler: str | None) -> bool:
        names.append(builder.name)
        return True

    monkeypatch.setattr(optimizers, "_loads", load)
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
    chosen = choose_optimizer(adam(zero, lr="auto", torch_adam="auto", fused="auto"), device)
    assert chosen["optimizer"]["params"] == {"lr": "auto"} | expected
    assert loaded == operators


def test_torchs_fused_adam_serves_where_deepspeeds_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = adam(torch_adam="auto", fused="auto")
    fused_torch = {"torch_adam": True, "fused": True}
    monkeypatch.setattr(optimizers, "CUDA_HOME", None)  # no CUDA toolkit
    assert choose_optimizer(config, CUDA)["optimizer"]["params"] == fused_torch

    def fail(builder: optimizers.OpBuilder) -> None:
        raise RuntimeError("CUDA 13.0 does not go with torch's 12.8\nmore lines")

    monkeypatch.setattr(optimizers, "installed_ops", {"fused_adam": True})
    monkeypatch.setattr(optimizers.FusedAdamBuilder, "load", fail)
    assert choose_optimizer(config, CUDA)["optimizer"]["params"] == fused_torch
    assert capsys.readouterr().out.count("\n") == 1


def test_a_stated_choice_is_kept(loaded: list[str]) -> None:
    for stated in ({"torch_adam": True}, {"torch_adam": True, "fused": False}, {}):
        assert choose_optimizer(adam(**stated), CUDA)["optimizer"]["params"] == stated
    assert choose_optimizer(adam(torch_adam=False, fused="auto"), CUDA)["optimizer"]["params"] == {
        "torch_adam": False
    }
    assert not loaded
    assert choose_optimizer({}, CPU) == {}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_is_refused_with_zero(stage: int) -> None:
    config = {"optimizer": {"type": "Lamb"}, "zero_optimization": {"stage": stage}}
    with pytest.raises(UserError, match=f"ZeRO stage {stage}.*stage.*0"):
        choose_optimizer(config, CPU)


def test_deepspeed_makes_the_other_optimizers() -> None:
    assert own_optimizer(adam(), "cpu") is None
    assert own_optimizer({}, "cpu") is None
