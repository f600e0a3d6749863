"""NVIDIA apex, where it is installed: FusedLAMB and FusedLayerNorm. The package index's ``apex`` is another package.

NVIDIA's is built from its source (github.com/NVIDIA/apex). It has run neither here nor in the tests, which use a
stand-in with its interface.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilspeed.trainer.errors import UserError

# The CUDA extensions that the two fused parts call; apex installs without them, too.
LAMB_EXTENSION = "amp_C"
LAYER_NORM_EXTENSION = "fused_layer_norm_cuda"
# Folders of NVIDIA's package. The unrelated one has none of them (it has views, forms and templates).
NVIDIA_PARTS = ("optimizers", "normalization", "multi_tensor_apply")
HOW_TO_INSTALL = "build NVIDIA's from source (github.com/NVIDIA/apex)"


@dataclass(frozen=True)
class Apex:
    """What this project uses of NVIDIA apex."""

    fused_lamb: Any  # apex.optimizers.FusedLAMB, a torch.optim.Optimizer; None without its extension
    fused_layer_norm: Any  # apex.normalization.FusedLayerNorm, an nn.Module; None without its extension


def find_apex() -> Apex | None:
    """NVIDIA apex, or None where no package of that name is installed.

    Raises:
        UserError: the installed ``apex`` is not NVIDIA's, or cannot be imported.
    """
    spec = importlib.util.find_spec("apex")  # looks, and runs nothing of a package that may be another's
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(all((folder / part).is_dir() for part in NVIDIA_PARTS) for folder in folders):
        raise UserError(
            "wrong-package",
            "the installed package apex is not NVIDIA's but an unrelated one of that name; "
            f"pip uninstall apex, then {HOW_TO_INSTALL} or do without",
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
    """apex's FusedLayerNorm, a class of ``nn.Module``.

    Raises:
        UserError: it cannot run on ``device``, or is not installed.
    """
    if device.type != "cuda":
        raise UserError("no-gpu", f"--apex_layer_norm needs a GPU, and this run is on {device}; leave it out")
    apex = find_apex()
    if apex is None or apex.fused_layer_norm is None:
        what = "apex is not installed" if apex is None else f"apex lacks its extension {LAYER_NORM_EXTENSION}"
        raise UserError(
            "missing-package",
            f"--apex_layer_norm: {what}; {HOW_TO_INSTALL} with CUDA extensions, or leave it out",
        )
    return apex.fused_layer_norm


def replace_layer_norms(model: nn.Module, replacement: Any) -> int:
    """Put ``replacement(shape, eps=…)`` in the place of every ``nn.LayerNorm`` of a model.

    The parameters stay the same objects under the same names: optimisers, checkpoints and exports see no change.

    Returns:
        how many were replaced.
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
