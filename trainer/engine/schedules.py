"""Learning rates of a schedule, step by step."""

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

# The parameters whose values torch's AdamW checks for the optimisers that only an engine can make.
ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay")


def learning_rates(config: DeepSpeedConfig, steps: int) -> Iterator[float]:
    """The learning rates of a resolved config's first steps, one after the other."""
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
    """Give the first step the rate of a schedule of DeepSpeed's that begins later than before its first iteration.

    DeepSpeed sets rates when such a schedule advances, and so leaves the first step the optimiser's own.
    """
    if getattr(scheduler, "last_batch_iteration", -1) >= 0:
        scheduler.step(scheduler.last_batch_iteration)


def schedules() -> dict[str, Any]:
    """Every schedule that an engine finds, by its name."""
    of_deepspeed = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    return classes_of(torch.optim.lr_scheduler, LRScheduler) | of_deepspeed


def classes_of(module: Any, kind: type) -> dict[str, Any]:
    """A module's classes of a kind, by their names."""
    return {
        name: member
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, kind)
    }


def one_number_optimizer(params: Mapping[str, Any]) -> Optimizer:
    """An AdamW of a single number with the parameters that all Adams have; it refuses senseless ones."""
    given = {key: params[key] for key in ADAM_PARAMS if key in params}
    if "betas" in given:
        _first, _second = given["betas"]
    return AdamW([torch.nn.Parameter(torch.zeros(1))], **given)


@contextmanager
def quiet() -> Iterator[None]:
    """What DeepSpeed and torch have to say they say again when the training starts."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
