"""Lamb computes the step of the paper's Algorithm 2."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from distilspeed.trainer.engine.lamb import Lamb

SHAPES = ((3, 5), (7,), (4,), (2, 2, 2))
STEPS = 4


def defined_steps(
    start: list[np.ndarray],
    gradients: list[list[np.ndarray]],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    max_coeff: float = math.inf,
    min_coeff: float = 0.0,
) -> list[np.ndarray]:
    """Compute You et al. 2020, Algorithm 2, in float64, one tensor at a time."""
    ends = []
    for i, x in enumerate(start):
        m = v = np.zeros_like(x)
        for t, at_step in enumerate(gradients, start=1):
            g = at_step[i]
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            r = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
            u = r + weight_decay * x
            norms = np.linalg.norm(x), np.linalg.norm(u)
            ratio = min(max(norms[0] / norms[1], min_coeff), max_coeff) if all(norms) else 1.0
            x = x - lr * ratio * u
        ends.append(x)
    return ends


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"lr": 0.05, "betas": (0.8, 0.98), "eps": 1e-3},
        {"max_coeff": 0.5},
        {"min_coeff": 2.0, "max_coeff": 3.0, "weight_decay": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_equals_the_papers(options: dict[str, Any], dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    start = [random.normal(size=shape) for shape in SHAPES]
    start[2][:] = 0  # a norm of 0, as of a new bias
    gradients = [[random.normal(size=shape) for shape in SHAPES] for _ in range(STEPS)]
    gradients[0][1][:] = 0  # an update of 0, unless there is weight decay

    parameters = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in start]
    optimizer = Lamb(parameters, **options)
    for at_step in gradients:
        for parameter, gradient in zip(parameters, at_step, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for parameter, expected in zip(parameters, defined_steps(start, gradients, **options), strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_every_group_has_its_own_learning_rate_and_count() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Lamb([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    # Adam's first update is the sign of the gradient. Its norm equals the parameter's here.
    torch.testing.assert_close(first.detach(), torch.full((3,), 0.9))
    torch.testing.assert_close(second.detach(), torch.full((3,), 0.5))
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]


def test_parameters_without_a_gradient_do_not_change() -> None:
    moved, still = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = Lamb([moved, still], weight_decay=0.1)
    moved.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3))
    assert still not in optimizer.state


def test_a_restored_state_continues_bit_for_bit() -> None:
    def run(steps: range, parameter: torch.nn.Parameter, optimizer: Lamb) -> None:
        for step in steps:
            parameter.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimizer.step()

    straight = torch.nn.Parameter(torch.linspace(1, 2, 5))
    optimizer = Lamb([straight])
    run(range(2), straight, optimizer)
    restored = torch.nn.Parameter(straight.detach().clone())
    other = Lamb([restored])
    other.load_state_dict(optimizer.state_dict())
    run(range(2, 4), straight, optimizer)
    run(range(2, 4), restored, other)
    assert torch.equal(straight, restored)
