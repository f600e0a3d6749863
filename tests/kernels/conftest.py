"""Fixtures of the losses' tests; makes ``cases`` importable."""

import sys
from pathlib import Path

import pytest

from distilspeed.kernels import cosine_loss
from distilspeed.kernels.implementation import distillation_loss_chunked, distillation_loss_ops
from distilspeed.kernels.implementation.backend import INTERPRETED, TRITON_INSTALLED

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["C++", pytest.param("PyTorch", marks=pytest.mark.full)])
def every_cpu_implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with the C++ kernels, and with the form for machines without a compiler."""
    if request.param == "PyTorch":
        if INTERPRETED:
            pytest.skip("the interpreter runs instead of both")
        for module in (distillation_loss_ops, cosine_loss):
            monkeypatch.setattr(module, "use_cpp", lambda _: False)


@pytest.fixture
def several_tiles_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and blocks so small that a test's few logits take several of each."""
    monkeypatch.setattr(distillation_loss_chunked, "BLOCK_BYTES", 700)
    if TRITON_INSTALLED:
        from distilspeed.kernels.implementation import distillation_loss_triton
        from distilspeed.kernels.implementation.launch_configs import LaunchConfig

        small = LaunchConfig(tile=16, num_warps=1)
        monkeypatch.setattr(distillation_loss_triton, "launch_config", lambda *_: small)
