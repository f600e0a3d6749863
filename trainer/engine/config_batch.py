"""Solve the batch equation from the DeepSpeed config and the command line."""

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import (
    ACCUMULATION_STEPS,
    MICRO_BATCH_SIZE,
    TRAIN_BATCH_SIZE,
    DeepSpeedConfig,
)
from distilspeed.trainer.errors import UserError

DEFAULT_MICRO_BATCH_SIZE = 8


def resolve_batch_equation(
    config: DeepSpeedConfig,
    world_size: int,
    train_batch_size: int | None = None,
    per_device_train_batch_size: int | None = None,
) -> BatchEquation:
    """Solve the batch equation from the values in config and command line, as DeepSpeed does.

    A flag of the command line fills a value that is "auto" or missing in the config.

    Raises:
        UserError: the values contradict each other, or the batch is not divisible; names the nearest batch that is.
    """
    total = _stated(config, TRAIN_BATCH_SIZE, train_batch_size, "--train_batch_size")
    micro = _stated(config, MICRO_BATCH_SIZE, per_device_train_batch_size, "--per_device_train_batch_size")
    accumulation = config.stated(ACCUMULATION_STEPS)
    if total is None:
        micro = micro or DEFAULT_MICRO_BATCH_SIZE
        accumulation = accumulation or 1
        return BatchEquation(micro * accumulation * world_size, micro, accumulation, world_size)
    if micro is None:
        unit = world_size * (accumulation or 1)
        _require_divisible(total, unit, f"{accumulation or 1} accumulation steps x {world_size} ranks")
        micro = total // unit
    if accumulation is None:
        _require_divisible(total, micro * world_size, f"micro-batch {micro} x {world_size} ranks")
        accumulation = total // (micro * world_size)
    if total != micro * accumulation * world_size:
        raise UserError(
            "indivisible-batch",
            f"train_batch_size {total} is not micro-batch {micro} x {accumulation} accumulation steps x {world_size} "
            f'ranks = {micro * accumulation * world_size}; set one of the three to "auto"',
        )
    return BatchEquation(total, micro, accumulation, world_size)


def _stated(config: DeepSpeedConfig, key: str, argument: int | None, flag: str) -> int | None:
    value = config.stated(key)
    if value is None:
        return argument
    if argument is not None and argument != value:
        raise UserError(
            "conflicting-config",
            f'{flag} {argument} contradicts "{key}": {value} in the DeepSpeed config; set that to "auto"',
        )
    return value


def _require_divisible(total: int, unit: int, product: str) -> None:
    if total % unit:
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = f"{below} and {above}" if below else str(above)
        raise UserError(
            "indivisible-batch",
            f"train_batch_size {total} is not divisible by {product}; the nearest that are: {nearest}",
        )
