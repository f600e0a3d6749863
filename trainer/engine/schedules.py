"""The learning rates of a schedule, step by step."""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distilspeed.trainer.engine.config import DeepSpeedConfig

# Some optimisers can be made only by an engine. torch's AdamW checks the values of these parameters in their place.
ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay")


def learning_rates(config: DeepSpeedConfig, steps: int) -> Iterator[float]:
    """Yield the learning rates of the first ``steps`` steps of a resolved config."""
    assert config.optimizer is not None
    optimizer = one_number_optimizer(config.optimizer.params)
    if config.scheduler is None:
        for _ in range(steps):
            yield float(optimizer.param_groups[0]["lr"])
        return
    with quiet():
        scheduler = schedules()[config.scheduler.type](optimizer, **config.scheduler.params)
        apply_first_rate(scheduler)
        for _ in range(steps):
            rate = float(optimizer.param_groups[0]["lr"])
            scheduler.step()
            yield rate


def apply_first_rate(scheduler: Any) -> None:
    """Apply a DeepSpeed schedule's rate to the first step, if the schedule starts at iteration 0 or later.

    DeepSpeed sets the rate only when a schedule advances, so the first step would use the optimiser's own rate.
    """
    if getattr(scheduler, "last_batch_iteration", -1) >= 0:
        scheduler.step(scheduler.last_batch_iteration)


def schedules() -> dict[str, Any]:
    """Return every schedule that an engine accepts, by its name."""
    of_deepspeed = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    return classes_of(torch.optim.lr_scheduler, LRScheduler) | of_deepspeed


def classes_of(module: Any, kind: type) -> dict[str, Any]:
    """Return the subclasses of ``kind`` in a module, by their names."""
    return {
        name: member
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, kind)
    }


def one_number_optimizer(params: Mapping[str, Any]) -> Optimizer:
    """Return an AdamW over a single number; AdamW raises an error for invalid ``params``."""
    given = {key: params[key] for key in ADAM_PARAMS if key in params}
    if "betas" in given:
        _first, _second = given["betas"]
    return AdamW([torch.nn.Parameter(torch.zeros(1))], **given)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress logs and warnings of DeepSpeed and torch, which they repeat when training starts."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
