"""NVIDIA apex is used if it is installed, and the unrelated package of the same name is refused.

The tests use a stub with NVIDIA's interface (apex 0.1, optimizers/fused_lamb.py and
normalization/fused_layer_norm.py), because the real package needs a GPU to build.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM
from user_errors import raises_user_error

from distilspeed.trainer.engine.apex import find_apex, fused_layer_norm, replace_layer_norms
from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.lamb import Lamb
from distilspeed.trainer.engine.optimizers import own_optimizer
from distilspeed.trainer.errors import UserErrorCode
from distilspeed.trainer.models.loading import load_teacher, make_student

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NVIDIA = {
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "",
    "apex/optimizers/__init__.py": """
import torch
class FusedLAMB(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                 amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                 use_nvlamb=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.max_grad_norm, self.use_nvlamb = max_grad_norm, use_nvlamb
""",
    "apex/normalization/__init__.py": """
import torch
class FusedLayerNorm(torch.nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__()
        self.normalized_shape, self.eps = torch.Size(normalized_shape), eps
        self.weight = torch.nn.Parameter(torch.ones(*normalized_shape))
        self.bias = torch.nn.Parameter(torch.zeros(*normalized_shape))
    def forward(self, input):
        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
""",
    "amp_C.py": "",
    "fused_layer_norm_cuda.py": "",
}
# Like apex 0.9.10dev on PyPI, a toolkit for the Pyramid web framework.
UNRELATED = {
    "apex/__init__.py": "raise SystemExit('code of a package that nobody asked for')",
    "apex/views.py": "",
    "apex/lib/__init__.py": "",
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Write a package's files to the path; remove its imported modules after the test."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "apex":
            del sys.modules[name]


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in NVIDIA.items() if name not in names}


def test_apex_is_none_if_no_such_package_is_installed() -> None:
    assert find_apex() is None


def test_nvidia_apex_is_found_with_the_parts_whose_extension_is_installed(
    install: Callable[[dict[str, str]], None],
) -> None:
    install(without("amp_C.py"))
    apex = find_apex()
    assert apex is not None
    assert apex.fused_lamb is None
    assert apex.fused_layer_norm.__name__ == "FusedLayerNorm"


def test_the_unrelated_package_is_refused_and_none_of_its_code_runs(
    install: Callable[[dict[str, str]], None],
) -> None:
    install(UNRELATED)
    with raises_user_error("wrong-package", "pip uninstall apex"):
        find_apex()
    with raises_user_error("wrong-package", "apex"):
        own_optimizer(DeepSpeedConfig({"optimizer": {"type": "Lamb"}}), "cuda")
    own_optimizer(DeepSpeedConfig({"optimizer": {"type": "AdamW"}}), "cuda")  # AdamW needs no apex


def test_an_apex_that_cannot_be_imported_is_refused(install: Callable[[dict[str, str]], None]) -> None:
    install(NVIDIA | {"apex/optimizers/__init__.py": "import a_module_that_is_missing"})
    with raises_user_error("wrong-package", "apex", "a_module_that_is_missing"):
        find_apex()


def test_lamb_is_from_apex_where_it_takes_the_same_step(install: Callable[[dict[str, str]], None]) -> None:
    install(NVIDIA)
    config = DeepSpeedConfig({"optimizer": {"type": "Lamb", "params": {"lr": 0.1, "betas": [0.9, 0.98]}}})
    parameters = [torch.nn.Parameter(torch.ones(2))]

    make = own_optimizer(config, "cuda")
    assert make is not None
    fused = make(parameters)
    assert type(fused).__name__ == "FusedLAMB"
    # By default apex would clip gradients to norm 1 and skip the trust ratio.
    assert (fused.max_grad_norm, fused.use_nvlamb) == (math.inf, True)

    limited = DeepSpeedConfig({"optimizer": {"type": "Lamb", "params": {"max_coeff": 10.0}}})
    for other, device in ((limited, "cuda"), (config, "cpu")):
        make = own_optimizer(other, device)
        assert make is not None
        assert type(make(parameters)) is Lamb


def test_layer_norms_are_replaced_and_nothing_else_changes(
    install: Callable[[dict[str, str]], None], tiny_teacher_dir: Path
) -> None:
    install(NVIDIA)
    teacher = load_teacher(str(tiny_teacher_dir))
    student = make_student(teacher, (0, 3)).eval()
    tokens = torch.arange(5, 25).view(2, 10)
    for model, norms in ((teacher, 10), (student, 6)):
        names = dict(model.named_parameters())
        before, state = model(tokens).logits, list(model.state_dict())
        assert replace_layer_norms(model, fused_layer_norm(CUDA)) == norms
        assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
        after = dict(model.named_parameters())
        assert after.keys() == names.keys()
        assert all(after[name] is names[name] for name in names)
        assert list(model.state_dict()) == state
        assert torch.equal(model(tokens).logits, before)  # epsilon and weights are unchanged
    assert isinstance(teacher, BertForMaskedLM)


@pytest.mark.parametrize(
    ("files", "device", "code", "named"),
    [
        ({}, CUDA, "missing-package", "--apex_layer_norm"),
        (without("fused_layer_norm_cuda.py"), CUDA, "missing-package", "fused_layer_norm_cuda"),
        (UNRELATED, CUDA, "wrong-package", "apex"),
        (NVIDIA, CPU, "no-gpu", "--apex_layer_norm"),
    ],
    ids=["absent", "no extension", "unrelated", "cpu"],
)
def test_fused_layer_norms_are_refused_where_they_cannot_run(
    install: Callable[[dict[str, str]], None],
    files: dict[str, str],
    device: torch.device,
    code: UserErrorCode,
    named: str,
) -> None:
    install(files)
    with raises_user_error(code, named):
        fused_layer_norm(device)
