"""The message on a name in a config that DeepSpeed does not know: it gives the nearest one that DeepSpeed does."""

import difflib
from collections.abc import Iterable

from distilspeed.trainer.errors import UserError


def unknown_key(path: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(path.rpartition(".")[2], sorted(known), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "remove it"
    return UserError(f'"{path}" in the DeepSpeed config is nothing that DeepSpeed reads; {advice}')


def unknown_type(section: str, name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    advice = f'did you mean "{near[0]}"?' if near else "see ds_configs/"
    return UserError(
        f'"{section}.type" in the DeepSpeed config is {name!r}, which is no {section} of DeepSpeed\'s; {advice}'
    )
