"""``measurements.json``: everything that an evaluation has measured, so that a killed one can be resumed."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.device_jobs import run_jobs
from distilspeed.trainer.evaluation.fill_mask import Guess
from distilspeed.trainer.evaluation.latency import Latency
from distilspeed.trainer.evaluation.report import Environment
from distilspeed.trainer.evaluation.task_checkpoint import check_same_settings
from distilspeed.trainer.evaluation.tasks.task import Scores, Task, shown_scores
from distilspeed.trainer.evaluation.token_quality import TokenQuality
from distilspeed.trainer.files import from_json, write_text, writing

logger = logging.getLogger(__name__)

MEASUREMENTS = "measurements.json"
EXAMPLES = "examples of "  # followed by the name of a task, in an identity


@dataclass(frozen=True)
class ModelMeasurements:
    """What is measured of a model without fine-tuning."""

    quality: TokenQuality
    teacher_agreement: float
    latencies: tuple[Latency, ...]
    guesses: tuple[tuple[Guess, ...], ...] = ()  # for each text of --fill_mask


@dataclass(frozen=True)
class Measurements:
    """The measurements so far.

    Attributes:
        identity: the settings and inputs that must not change when the evaluation is resumed.
        models: in the order of the report; empty before they are measured.
        machine: where and when the models were measured; an evaluation may be resumed on another machine.
        runs: the scores of finished fine-tuning runs, by task, model, learning rate and seed.
    """

    identity: dict[str, str]
    models: tuple[ModelMeasurements, ...] = ()
    machine: Environment | None = None
    runs: dict[str, Scores] = field(default_factory=dict)


class MeasurementsFile:
    """Measures each thing once: a value that is in the file is read, a new one is added to the file."""

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        """Read the file if there is one; the identity may have new tasks.

        Raises:
            UserError: the file is damaged or unreadable, or of an evaluation with other settings or inputs.
        """
        self.path = path
        self._so_far = Measurements(dict(identity))
        if path.exists():
            try:
                self._so_far = from_json(Measurements, path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(
                    "damaged-checkpoint",
                    f"cannot read {path}: {error}; remove it to start from the beginning",
                ) from error
            saved = self._so_far.identity
            new_tasks = {name for name in identity if name.startswith(EXAMPLES)} - saved.keys()
            check_same_settings(
                path, saved, {name: value for name, value in identity.items() if name not in new_tasks}
            )
            self._so_far = replace(self._so_far, identity={**saved, **identity})

    def models(
        self, measure: Callable[[], tuple[ModelMeasurements, ...]], device: torch.device
    ) -> tuple[tuple[ModelMeasurements, ...], Environment]:
        """Return the measurements of all models, and the machine they were measured on."""
        if self._so_far.machine is None:
            self._save(replace(self._so_far, models=measure(), machine=Environment.here(device)))
        assert self._so_far.machine
        return self._so_far.models, self._so_far.machine

    def runs(
        self,
        jobs: Mapping[str, Callable[[torch.device], Scores]],
        device: torch.device,
        at_a_time: int,
    ) -> Mapping[str, Scores]:
        """Do the fine-tuning runs that are not in the file; return the scores of all, by the names of the runs."""
        missing = {name: job for name, job in jobs.items() if name not in self._so_far.runs}
        for name, scores in run_jobs(missing, device, at_a_time):
            logger.info("%s: %s", name, shown_scores(scores))
            self._save(replace(self._so_far, runs={**self._so_far.runs, name: scores}))
        return self._so_far.runs

    def _save(self, measurements: Measurements) -> None:
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(asdict(measurements), indent=2, allow_nan=False) + "\n")
        self._so_far = measurements


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_digest(model: PreTrainedModel) -> str:
    """Return the beginning of a SHA-256 over a model's weights and config, but not its path."""
    config = model.config.to_dict()
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        found.update(name.encode())
        found.update(weight.numpy(force=True).tobytes())
    return found.hexdigest()[:16]


def corpus_digest(corpus: Corpus) -> str:
    """Return the beginning of a SHA-256 over a corpus's manifest, which has checksums of its files."""
    return digest(corpus.manifest.to_json())


def task_digest(task: Task) -> str:
    """Return the beginning of a SHA-256 over a task's examples."""
    return digest(repr(task))
