"""``train_config.json``: the settings of a run, their later changes, and the settings that --resume may change.

The settings at the start are never overwritten. The changes of a resumed run are appended under "changes".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from distilspeed.trainer.data.masking import SMOOTHING
from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.config_auto import OF_MACHINES, SCHEDULE_LENGTH, Started
from distilspeed.trainer.engine.schedules import learning_rates
from distilspeed.trainer.errors import UserError, first_line
from distilspeed.trainer.files import write_text, writing

NAME = "train_config.json"
TOTAL_STEPS = "total_steps"
COMPILE = "compile"
# Settings of the DeepSpeed config that a resumed run may change: the optimiser's, and the heights of a schedule.
CHANGEABLE = {
    "gradient_clipping",
    *(f"optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
    *(
        f"scheduler.params.{name}"
        for name in (
            *("warmup_min_lr", "warmup_max_lr", "cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr"),
            *("eta_min", "max_lr", "base_lr"),
        )
    ),
}
# Sections that affect what is computed. Their settings must not change, except those in CHANGEABLE.
FIXED_SECTIONS = ("optimizer", "scheduler", "fp16", "bf16", "gradient_clipping")
# Settings that affect how ZeRO lays out the states in a checkpoint.
FIXED_LAYOUT = tuple(
    f"zero_optimization.{name}"
    for name in ("round_robin_gradients", "sub_group_size", "parameter_alignment", "elastic_checkpoint")
)
# Values of settings that an identity lacks if they are the default.
UNRECORDED = {"mlm_smoothing": SMOOTHING}

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Record:
    """The contents of ``train_config.json``.

    Attributes:
        identity: the settings that must not change, as at the start (``identity.identity_of``).
        attention: transformers' names of the attention implementations, for "student" and "teacher".
        compile: whether the encoders are compiled, "on" or "off", with all changes applied.
        started: current config and number of steps: those of the start, with all changes applied.
        changes: the changes made when the run was resumed, one line each.
        student_step: the step at which ``student/`` was exported, if it exists.
    """

    identity: dict[str, Any]
    attention: dict[str, str]
    compile: Literal["on", "off"]
    started: Started
    changes: tuple[str, ...]
    student_step: int


def read_record(output_dir: Path) -> Record | None:
    """Return the record of a run that was started before; None if there is none.

    Raises:
        UserError: the record cannot be read.
    """
    path = output_dir / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        identity, config = dict(content["identity"]), content["deepspeed_config"]
        total_steps, lines = int(identity[TOTAL_STEPS]), []
        compiled = content.get("arguments", {}).get(COMPILE) in (True, "on")
        for change in content.get("changes", []):
            for name, (_, now) in change["changed"].items():
                if name == TOTAL_STEPS:
                    total_steps = int(now)
                elif name == COMPILE:
                    compiled = now == "on"
                else:
                    _put(config, name, now)
            lines.append(_line(change["after_step"], change["changed"]))
        return Record(
            identity,
            dict(content["attention"]),
            "on" if compiled else "off",
            Started(DeepSpeedConfig(config), total_steps),
            tuple(lines),
            int(content.get("student_step", identity[TOTAL_STEPS])),  # older versions export only at the end
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            "damaged-record",
            f"cannot read {path}: {first_line(error)}; restore it, or choose another --output_dir",
        ) from error


def find_changes(
    record: Record, identity: Mapping[str, Any], config: DeepSpeedConfig, total_steps: int
) -> Changes:
    """Return the settings that a resumed run changes: (before, now) by path.

    Raises:
        UserError: a setting differs that cannot be changed; names it.
    """
    # A name that only one identity has is a setting of an optional term.
    for name in [*identity, *(record.identity.keys() - identity.keys())]:
        before, value = (of.get(name, UNRECORDED.get(name)) for of in (record.identity, identity))
        if name != TOTAL_STEPS and before != value:
            raise _refusal(name, before, value)
    before_config = record.started.deepspeed_config
    settings = _fixed_settings(before_config), _fixed_settings(config)
    # Compare a type before its parameters, so that the error names the type.
    names = sorted({*settings[0], *settings[1]}, key=lambda name: (".params." in name, name))
    changes: Changes = {}
    for name in names:
        before, now = (of.get(name) for of in settings)
        if before == now:
            continue
        if name == SCHEDULE_LENGTH and total_steps != record.started.total_steps:
            raise UserError(
                "unsuitable-schedule",
                f"the learning rate of this run falls to 0 over {record.started.total_steps} steps "
                f"({settings[1]['scheduler.type']}), not over {total_steps}; resume it with the same number of steps, "
                "or choose another --output_dir (a run that starts with WarmupLR, or with a larger total_num_steps, "
                "can be extended)",
            )
        if name not in CHANGEABLE:
            raise _refusal(name, before, now)
        changes[name] = (before, now)
    if total_steps != record.started.total_steps:
        _check_schedule_lasts(config, total_steps)
        changes[TOTAL_STEPS] = (record.started.total_steps, total_steps)
    return changes


def _fixed_settings(config: DeepSpeedConfig) -> dict[str, Any]:
    """Return the settings that a resumed run is compared by, by their paths."""
    settings = {name: value for name, value in config.settings().items() if _is_fixed(name)}
    return settings | {"gradients are summed in fp32": config.accumulates_in_fp32}


def _is_fixed(name: str) -> bool:
    # The implementation of Adam depends on the machines, and is not known before the ranks have joined.
    return name not in OF_MACHINES and (name.partition(".")[0] in FIXED_SECTIONS or name in FIXED_LAYOUT)


def _check_schedule_lasts(config: DeepSpeedConfig, total_steps: int) -> None:
    length = config.settings().get(SCHEDULE_LENGTH, total_steps)
    last = list(islice(learning_rates(config, total_steps), total_steps - 1, None))
    if total_steps > length or not any(last):
        raise UserError(
            "unsuitable-schedule",
            f"the schedule of this run ends before step {total_steps} ({SCHEDULE_LENGTH} {length}); "
            "give fewer steps, or start a run with a longer schedule in another --output_dir",
        )


def _refusal(name: str, before: object, now: object) -> UserError:
    return UserError(
        "changed-run",
        f"this run was started with {name} {_shown(before)}, not {_shown(now)}; "
        "resume it with the same value, or choose another --output_dir",
    )


def _shown(value: object) -> object:
    return "none" if value is None else value


def write_record(output_dir: Path, content: Mapping[str, Any]) -> None:
    """Write the record of a new run.

    Raises:
        UserError: the record cannot be written.
    """
    with writing(output_dir / NAME):
        write_text(output_dir / NAME, json.dumps(content, indent=2) + "\n")


def append_changes(output_dir: Path, step: int, changes: Changes, student_step: int) -> str:
    """Append the changes of a resumed run to its record, and return them as one line.

    Raises:
        UserError: the record cannot be written.
    """
    _update(output_dir, {"student_step": student_step}, {"after_step": step, "changed": changes})
    return _line(step, changes)


def record_student(output_dir: Path, step: int) -> None:
    """Record the step at which ``student/`` was exported."""
    _update(output_dir, {"student_step": step})


def _update(output_dir: Path, values: Mapping[str, Any], change: Mapping[str, Any] | None = None) -> None:
    path = output_dir / NAME
    with writing(path):
        content = json.loads(path.read_text(encoding="utf-8")) | values
        if change is not None:
            content["changes"] = [*content.get("changes", []), change]
        write_text(path, json.dumps(content, indent=2) + "\n")


def _line(step: int, changes: Mapping[str, Any]) -> str:
    changed = ", ".join(
        f"{name} {_shown(before)} -> {_shown(now)}" for name, (before, now) in changes.items()
    )
    return f"after step {step}: {changed}"


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = value
