"""LAMB for very large batches (You et al. 2020, arXiv 1904.00962, Algorithm 2).

For each parameter tensor x with gradient g, at step t (elementwise; norms over the whole tensor):

    m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
    r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
    u = r + weight_decay x
    trust ratio = ||x|| / ||u||, clamped to [min_coeff, max_coeff]; 1 if either norm is 0
    x = x - lr * trust ratio * u

NVIDIA apex's FusedLAMB computes the same with ``use_nvlamb``, but cannot clamp the trust ratio. DeepSpeed's FusedLamb
computes a different step: it applies the bias correction to the learning rate instead of m and v, where the trust
ratio would cancel it. Its first steps therefore differ by a factor of sqrt(1 - beta2^t) / (1 - beta1^t).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Tensors(NamedTuple):
    """The parameters of a group that have gradients, and their states; all lists have the same order."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    first_moments: list[Tensor]
    second_moments: list[Tensor]


class Lamb(Optimizer):
    """LAMB with PyTorch's foreach operations: a few kernel launches for all tensors together.

    Args:
        params: floating-point parameters or parameter groups; DeepSpeed's optimisers pass float32.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, and part of the trust ratio.
        max_coeff: upper limit of the trust ratio; None for no limit, as in the paper's experiments.
        min_coeff: lower limit of the trust ratio.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_coeff: float | None = None,
        min_coeff: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient do not change."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Count per group, not per tensor: DeepSpeed's checkpoints keep groups unchanged.
            group["step"] = group.get("step", 0) + 1
            tensors = self._tensors(group)
            if tensors.parameters:
                _update(tensors, group)
        return loss

    def _tensors(self, group: dict[str, Any]) -> _Tensors:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        return _Tensors(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
        )


def _update(tensors: _Tensors, group: dict[str, Any]) -> None:
    (beta1, beta2), step = group["betas"], group["step"]
    parameters, gradients, first, second = tensors
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)

    root = torch._foreach_sqrt(second)
    torch._foreach_div_(root, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(root, group["eps"])
    updates = list(torch._foreach_div(first, root))
    torch._foreach_div_(updates, 1 - beta1**step)
    if group["weight_decay"]:
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])

    ratios = _trust_ratios(parameters, updates, group["min_coeff"], group["max_coeff"])
    # The ratios stay on the device: reading them would synchronise at every step.
    torch._foreach_mul_(updates, list((-group["lr"] * ratios).unbind()))
    torch._foreach_add_(parameters, updates)


def _trust_ratios(
    parameters: list[Tensor], updates: list[Tensor], lowest: float, highest: float | None
) -> Tensor:
    """Return one ratio per tensor, shape [tensors]."""
    parameter_norms = torch.stack(torch._foreach_norm(parameters))
    update_norms = torch.stack(torch._foreach_norm(updates))
    ratios = (parameter_norms / update_norms).clamp(min=lowest, max=highest)
    both = (parameter_norms > 0) & (update_norms > 0)
    return torch.where(both, ratios, torch.ones_like(ratios))
