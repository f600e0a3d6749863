"""FusedLAMB and FusedLayerNorm from NVIDIA apex, if it is installed. ``apex`` on PyPI is an unrelated package.

NVIDIA apex must be built from source (github.com/NVIDIA/apex). The tests use a stub with the same interface; this
code has not yet run with the real package.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilspeed.trainer.errors import UserError

# The CUDA extensions that the two fused parts call. apex can be installed without them.
LAMB_EXTENSION = "amp_C"
LAYER_NORM_EXTENSION = "fused_layer_norm_cuda"
# Folders of NVIDIA's package. The unrelated package has none of them (it has views, forms and templates).
NVIDIA_PARTS = ("optimizers", "normalization", "multi_tensor_apply")
HOW_TO_INSTALL = "build NVIDIA apex from source (github.com/NVIDIA/apex)"


@dataclass(frozen=True)
class Apex:
    """The parts of NVIDIA apex that this project uses."""

    fused_lamb: Any  # apex.optimizers.FusedLAMB, a torch.optim.Optimizer; None without its extension
    fused_layer_norm: Any  # apex.normalization.FusedLayerNorm, an nn.Module; None without its extension


def find_apex() -> Apex | None:
    """Return NVIDIA apex, or None if no package of that name is installed.

    Raises:
        UserError: the installed ``apex`` is not NVIDIA's, or cannot be imported.
    """
    spec = importlib.util.find_spec("apex")  # does not run the package, which may be the unrelated one
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(all((folder / part).is_dir() for part in NVIDIA_PARTS) for folder in folders):
        raise UserError(
            "wrong-package",
            "the installed package apex is not NVIDIA's but an unrelated package of the same name; "
            f"pip uninstall apex, then {HOW_TO_INSTALL} or run without it",
        )
    try:
        optimizers = importlib.import_module("apex.optimizers")
        normalization = importlib.import_module("apex.normalization")
    except (ImportError, RuntimeError, AttributeError) as error:
        raise UserError(
            "wrong-package", f"the installed apex cannot be imported: {error}; {HOW_TO_INSTALL} again"
        ) from error
    return Apex(
        optimizers.FusedLAMB if importlib.util.find_spec(LAMB_EXTENSION) else None,
        normalization.FusedLayerNorm if importlib.util.find_spec(LAYER_NORM_EXTENSION) else None,
    )


def fused_layer_norm(device: torch.device) -> Any:
    """Return apex's FusedLayerNorm, a subclass of ``nn.Module``.

    Raises:
        UserError: it cannot run on ``device``, or is not installed.
    """
    if device.type != "cuda":
        raise UserError(
            "no-gpu", f"--apex_layer_norm needs a GPU, but this run is on {device}; omit the flag"
        )
    apex = find_apex()
    if apex is None or apex.fused_layer_norm is None:
        what = "apex is not installed" if apex is None else f"apex has no extension {LAYER_NORM_EXTENSION}"
        raise UserError(
            "missing-package",
            f"--apex_layer_norm: {what}; {HOW_TO_INSTALL} with CUDA extensions, or omit the flag",
        )
    return apex.fused_layer_norm


def replace_layer_norms(model: nn.Module, replacement: Any) -> int:
    """Replace every ``nn.LayerNorm`` of a model with ``replacement(shape, eps=…)``.

    Parameter objects and names stay the same, so optimisers, checkpoints and exports see no change.

    Returns:
        the number of replaced layer norms.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, layer_norm in list(parent.named_children()):
            if type(layer_norm) is nn.LayerNorm and layer_norm.bias is not None:
                fused = replacement(layer_norm.normalized_shape, eps=layer_norm.eps)
                fused.weight, fused.bias = layer_norm.weight, layer_norm.bias
                fused.train(layer_norm.training)
                setattr(parent, name, fused)
                replaced += 1
    return replaced
