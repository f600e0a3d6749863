"""The contents of ``train_config.json`` for a new run, and the settings that must not change when it is resumed."""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from distilspeed.trainer.data.masking import SMOOTHING
from distilspeed.trainer.training.record import write_record
from distilspeed.trainer.training.run import Run

RECORDED_PACKAGES = ("distilspeed", "torch", "deepspeed", "transformers", "datasets")


def record_run(run: Run, identity: dict[str, Any], attention: dict[str, str]) -> None:
    """Write ``train_config.json`` of a new run.

    Raises:
        UserError: the file cannot be written.
    """
    write_record(
        run.arguments.output_dir,
        {
            "identity": identity,
            "arguments": {name: _plain(value) for name, value in asdict(run.arguments).items()}
            | run.objective.settings(),
            "deepspeed_config": run.deepspeed_config.to_dict(),
            "student_layers": run.layers,
            "attention": attention,
            "versions": {package: version(package) for package in RECORDED_PACKAGES},
            "changes": [],
            "student_step": 0,
        },
    )


def identity_of(run: Run) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed.

    Models that the run starts from are compared by hashes of all their weights.
    """
    optimizer = run.deepspeed_config.optimizer
    # Only if they are given.
    added: dict[str, Any] = {}
    if run.arguments.student is not None:
        added["starting_student"] = _weights_hash(run.student)
    if run.arguments.student_config is not None:
        added["student_config"] = _config_hash(run.student.config)
    if run.arguments.mlm_smoothing != SMOOTHING:
        added["mlm_smoothing"] = run.arguments.mlm_smoothing
    return (
        {
            "teacher": _weights_hash(run.teacher) if run.teacher else None,
            "student": asdict(run.shapes()[0]),
            "student_layers": list(run.layers),
            "data": {record.path: record.sha256 for record in run.corpus.manifest.files},
            "train_batch_size": run.batch.train_batch_size,
            "micro_batch_size": run.batch.micro_batch_size,
            "total_steps": run.total_steps,
            "precision": run.precision,
            "zero_stage": run.deepspeed_config.zero_stage,
            "optimizer": optimizer.type if optimizer else None,
            "seed": run.arguments.seed,
        }
        | added
        | run.objective.identity()
    )


def _weights_hash(model: PreTrainedModel) -> str:
    """Return the SHA-256 of all weights (float32) and their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def _config_hash(config: PreTrainedConfig) -> str:
    """Return the SHA-256 of the settings that differ from the defaults, without the config's name and version."""
    settings = config.to_diff_dict()
    for name in ("transformers_version", "_name_or_path", "dtype"):
        settings.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
