"""Reading ``train_config.json`` when a run is resumed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from user_errors import raises_user_error

from distilspeed.trainer.training.record import NAME, find_changes, read_record


def write(folder: Path, config: object) -> Path:
    content = {"identity": {"total_steps": 10}, "attention": {}, "deepspeed_config": config}
    (folder / NAME).write_text(json.dumps(content))
    return folder


def test_the_config_is_read_with_its_later_changes_applied(tmp_path: Path) -> None:
    folder = write(tmp_path, {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}})
    content = json.loads((folder / NAME).read_text())
    changed = {"optimizer.params.lr": [1e-3, 1e-4], "total_steps": [10, 20]}
    (folder / NAME).write_text(json.dumps(content | {"changes": [{"after_step": 5, "changed": changed}]}))
    record = read_record(folder)
    assert record
    config = record.started.deepspeed_config
    assert (config.zero_stage, config.settings()["optimizer.params.lr"]) == (2, 1e-4)
    assert record.started.total_steps == 20


@pytest.mark.parametrize("config", [None, "auto", {"optimizer": []}, {"zero_optimization": {"stage": 7}}])
def test_a_record_with_an_invalid_config_is_refused_and_named(tmp_path: Path, config: object) -> None:
    with raises_user_error("damaged-record", NAME):
        read_record(write(tmp_path, config))


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"mlm_smoothing": 0.0}, "mlm_smoothing 0.7, not 0.0"),
        ({"mlm_smoothing": 0.0}, {}, "mlm_smoothing 0.0, not 0.7"),
        ({}, {"starting_student": "a1"}, "starting_student none, not a1"),
    ],
)
def test_a_setting_that_an_identity_lacks_has_its_default(
    tmp_path: Path, before: dict[str, object], now: dict[str, object], named: str
) -> None:
    record = read_record(write(tmp_path, {}))
    assert record
    with raises_user_error("changed-run", named):
        find_changes(
            replace(record, identity=record.identity | before),
            record.identity | now,
            record.started.deepspeed_config,
            10,
        )
