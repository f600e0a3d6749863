"""Knowledge distillation of Transformers on DeepSpeed, with fused losses for any trainer.

Exports the losses. Importing the package alone imports neither PyTorch nor Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilspeed.kernels.cosine_loss import CosineLoss, cosine_loss
    from distilspeed.kernels.distillation_loss import DistillationLoss, distillation_loss
    from distilspeed.kernels.linear_distillation_loss import LinearDistillationLoss, linear_distillation_loss
    from distilspeed.kernels.weighted_distillation_loss import weighted_distillation_loss

__version__ = "0.1.0"
__all__ = [
    "CosineLoss",
    "DistillationLoss",
    "LinearDistillationLoss",
    "__version__",
    "cosine_loss",
    "distillation_loss",
    "linear_distillation_loss",
    "weighted_distillation_loss",
]

# The modules of the classes; a function is in the module of its name.
_MODULES = {
    "CosineLoss": "cosine_loss",
    "DistillationLoss": "distillation_loss",
    "LinearDistillationLoss": "linear_distillation_loss",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.kernels.{_MODULES.get(name, name)}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
