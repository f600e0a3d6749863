"""Errors for names in a config that DeepSpeed does not know; they suggest the closest known name."""

import difflib
from collections.abc import Iterable

from distilspeed.trainer.errors import UserError


def unknown_key(path: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(path.rpartition(".")[2], sorted(known), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "remove it"
    return UserError(
        "unknown-config-key", f'"{path}" in the DeepSpeed config is not a DeepSpeed key; {advice}'
    )


def unknown_type(section: str, name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "see ds_configs/"
    return UserError(
        "unsupported-optimizer" if section == "optimizer" else "unsupported-scheduler",
        f'"{section}.type" in the DeepSpeed config is {name!r}, which DeepSpeed does not have; {advice}',
    )
