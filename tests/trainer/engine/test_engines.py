"""A precision that the device or DeepSpeed does not support is refused before training starts."""

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from user_errors import raises_user_error

from distilspeed.trainer.engine.student import check_precision
from distilspeed.trainer.job.ranks import Process, this_process
from distilspeed.trainer.models.flops import warn_of_slow_bf16

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_fp16_is_refused_if_the_device_does_not_support_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with raises_user_error("unsupported-precision", "fp16", '"bf16"'):
        check_precision("fp16", CPU)
    check_precision("fp32", CPU)


@pytest.mark.parametrize(
    ("capability", "refused"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)]
)
def test_bf16_is_refused_on_gpus_that_emulate_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if refused:
        with raises_user_error("unsupported-precision", "bf16", '"fp16"'):
            check_precision("bf16", CUDA)
    else:
        check_precision("bf16", CUDA)


@pytest.mark.parametrize(("capability", "warned"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_bf16_on_a_cpu_without_avx512_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: str,
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_slow_bf16("fp32", CPU)
    assert not caplog.records
    warn_of_slow_bf16("bf16", CPU)
    assert ("bf16 take many times as long" in caplog.text) == warned


@pytest.mark.parametrize("version", ["0.18.9", "0.19.7"])
def test_a_deepspeed_that_scales_gradients_wrongly_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(deepspeed, "__version__", version)
    with raises_user_error("wrong-package", version):
        check_precision("fp32", CPU)


def test_without_a_launcher_this_process_is_the_whole_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = this_process()
    assert (found.rank, found.local_rank, found.world_size) == (0, 0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert this_process() == Process(3, 1, 4, this_process().device)
