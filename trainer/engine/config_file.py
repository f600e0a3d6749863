"""Read the file of a DeepSpeed config."""

import json
import math
from pathlib import Path
from typing import Any

from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.shipped_configs import find_config, shipped_configs
from distilspeed.trainer.errors import UserError


def read_deepspeed_config(path: Path) -> DeepSpeedConfig:
    """Read a DeepSpeed config file (JSON).

    Args:
        path: the file, or the name of a shipped config, such as "cpu".

    Raises:
        UserError: the file is missing or is not a JSON object, repeats a key, has a number that is not finite, or
            has a wrong type or value in a section that this project reads.
    """
    try:
        text = find_config(path).read_text(encoding="utf-8")
        config = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except OSError as error:
        raise UserError(
            "unreadable-config",
            f"cannot read the DeepSpeed config {path}: {error.strerror}; "
            f"give a file, or the name of a shipped config: {', '.join(shipped_configs())}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            "unreadable-config", f"the DeepSpeed config {path} is not valid JSON: {error}; see ds_configs/"
        ) from error
    if not isinstance(config, dict):
        raise UserError("bad-config", f"the DeepSpeed config {path} must hold a JSON object; see ds_configs/")
    return DeepSpeedConfig(config)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        repeated = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f'"{repeated}" appears twice in one object')
    return section


def _whole(text: str) -> int:
    number = int(text)
    if abs(number) >= 1 << 63:
        raise ValueError(f"a number with {len(text)} digits is too large")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
