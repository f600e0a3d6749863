"""The encoders are compiled where that pays and works."""

import pytest
import torch

from distilspeed.trainer.models import compilation
from distilspeed.trainer.models.compilation import compiler_fault, compiling_pays

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "is_deterministic", "expected"),
    [
        (CUDA, (7, 0), True, True),
        (CUDA, (9, 0), True, True),
        (CUDA, (6, 1), True, False),
        (CUDA, (9, 0), False, False),
        (CPU, None, True, False),
    ],
)
def test_compiling_pays_on_gpus_with_a_deterministic_compiler(
    device: torch.device,
    capability: tuple[int, int] | None,
    is_deterministic: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    if not is_deterministic:
        monkeypatch.delattr(compilation.inductor, "deterministic")
    assert compiling_pays(device) is expected


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiler_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_fault(CPU) is None

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fails)
    assert compiler_fault(CPU) == "no C++ compiler"
