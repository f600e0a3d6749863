"""Train and evaluate the variants of an ablation: the work of launch/ablation.py.

student_config/       the student's config, for random weights
untrained_student/    the teacher's layers as a model
VARIANT/seed_N/       run/, a run of launch/train.py; train.log, its output; scores.json, which marks the end
"""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.ablation import (
    ACCURACY,
    FULL,
    AblationReport,
    Variant,
    VariantResult,
    variants,
    with_task_mean,
    write_ablation,
)
from distilspeed.trainer.evaluation.ablation_arguments import AblationArguments
from distilspeed.trainer.evaluation.comparison import choose_device
from distilspeed.trainer.evaluation.fine_tuning import fine_tune
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.evaluation.report import Environment
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.task import Task
from distilspeed.trainer.files import (
    check_unoccupied,
    folder_written_whole,
    parents_made,
    write_text,
    writing,
)
from distilspeed.trainer.job.ranks import free_port
from distilspeed.trainer.models.flops import model_shape
from distilspeed.trainer.models.inputs import tokenizer_for
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_language_model,
    load_teacher,
    make_student,
    select_teacher_layers,
)
from distilspeed.trainer.training.metrics import read_metrics

logger = logging.getLogger(__name__)

SETTINGS, SCORES, LOG = "ablation_arguments.json", "scores.json", "train.log"
# What may change when an ablation goes on: seeds and variants are added.
CHANGEABLE = ("output_dir", "seeds", "variants", "num_gpus", "device")


@dataclass(frozen=True)
class _Ablation:
    """The inputs of an ablation, loaded and checked."""

    arguments: AblationArguments
    corpus: Corpus
    tasks: Sequence[Task]
    chosen: Sequence[Variant]
    device: torch.device

    def folder(self, variant: str, seed: int) -> Path:
        return self.arguments.output_dir / variant / f"seed_{seed}"

    @property
    def untrained(self) -> Path:
        return self.arguments.output_dir / "untrained_student"

    @property
    def student_config(self) -> Path:
        return self.arguments.output_dir / "student_config"


def run_ablation(arguments: AblationArguments) -> AblationReport:
    """Train and evaluate what is not done yet; write the report to the output folder.

    Raises:
        UserError: anything the caller can fix, if possible before the first training.
        NumericalError: a loss or a score is not finite.
    """
    corpus = open_corpus(arguments.data_dir)
    ablation = _Ablation(
        arguments,
        corpus,
        read_tasks(arguments.task_names),
        _chosen_variants(arguments.variants, corpus.manifest.objective),
        choose_device(arguments.device),
    )
    _check_settings(arguments)
    if not ablation.untrained.exists():
        _write_students(ablation, _make_student(ablation))
    results = []
    for variant in ablation.chosen:
        of_seeds = [_scores_of_variant(ablation, variant, seed) for seed in range(arguments.seeds)]
        results.append(VariantResult(variant.name, variant.title, tuple(map(with_task_mean, of_seeds))))
    teacher = [_scores(ablation, "teacher", arguments.teacher, seed) for seed in range(arguments.seeds)]
    report = AblationReport(
        teacher=tuple(map(with_task_mean, teacher)),
        results=tuple(results),
        max_steps=arguments.max_steps,
        tokens=read_metrics(ablation.folder(FULL.name, 0) / "run" / "metrics.jsonl")[-1].tokens,
        seconds=sum(_record(path)["seconds"] for path in arguments.output_dir.rglob(SCORES)),
        machine=Environment.here(ablation.device),
    )
    with writing(arguments.output_dir):
        write_ablation(report, arguments.output_dir)
    return report


def _chosen_variants(names: str | None, objective: TrainingObjective) -> list[Variant]:
    known = {variant.name: variant for variant in variants(objective)}
    chosen = list(known) if names is None else names.split(",")
    for name in chosen:
        if name not in known:
            raise UserError(
                "bad-argument", f"--variants {name} is unknown; choose from {', '.join(list(known)[1:])}"
            )
    return [FULL, *(known[name] for name in chosen if name != FULL.name)]


def _settings(arguments: AblationArguments) -> dict[str, str]:
    return {
        name: str(value)
        for name, value in asdict(arguments).items()
        if name not in CHANGEABLE and value is not None
    }


def _check_settings(arguments: AblationArguments) -> None:
    """Compare the settings with those of the earlier calls.

    Raises:
        UserError: they differ, or the output folder holds something else.
    """
    path, settings = arguments.output_dir / SETTINGS, _settings(arguments)
    if not path.exists():
        check_unoccupied(arguments.output_dir)
        return
    before: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    for name in before.keys() | settings.keys():
        if before.get(name) != settings.get(name):
            raise UserError(
                "changed-run",
                f"the ablation in {arguments.output_dir} has --{name} {before.get(name)}, not {settings.get(name)}; "
                "use the same, or choose another --output_dir",
            )


def _make_student(ablation: _Ablation) -> PreTrainedModel:
    arguments = ablation.arguments
    teacher = load_teacher(arguments.teacher)
    check_fits_corpus("teacher", arguments.teacher, teacher, ablation.corpus)
    return make_student(teacher, select_teacher_layers(teacher.config, arguments.student_layers))


def _write_students(ablation: _Ablation, student: PreTrainedModel) -> None:
    """Write the settings, the student's config, and the student as it is before any training."""
    folder = ablation.arguments.output_dir
    with parents_made(folder):
        folder.mkdir(exist_ok=True)
        write_text(folder / SETTINGS, json.dumps(_settings(ablation.arguments), indent=2) + "\n")
        student.config.save_pretrained(ablation.student_config)
        with folder_written_whole(ablation.untrained) as untrained:
            student.save_pretrained(untrained)
            tokenizer_for(student, ablation.corpus.load_tokenizer()).save_pretrained(untrained)


def _scores_of_variant(ablation: _Ablation, variant: Variant, seed: int) -> Mapping[str, float]:
    folder = ablation.folder(variant.name, seed)
    if not variant.is_trained:
        return _scores(ablation, variant.name, str(ablation.untrained), seed)
    if not (folder / SCORES).exists():
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        _train(ablation, variant, seed, folder)
        return _scores(
            ablation, variant.name, str(folder / "run" / "student"), seed, time.monotonic() - started
        )
    return _record(folder / SCORES)["scores"]


def _scores(
    ablation: _Ablation, name: str, model: str, seed: int, seconds: float = 0.0
) -> Mapping[str, float]:
    """Return the scores of a model that is fine-tuned with a seed; recorded, so that they are computed once.

    Args:
        seconds: the time of the training, for the record.
    """
    path = ablation.folder(name, seed) / SCORES
    if path.exists():
        return _record(path)["scores"]
    started = time.monotonic()
    logger.info("%s, seed %d: evaluation", name, seed)
    loaded = nn.Module.to(load_language_model(name, model), ablation.device)
    quality = held_out_quality(loaded, ablation.corpus, ablation.arguments.max_rows)
    scores = {ACCURACY: quality.accuracy}
    tokenizer = ablation.corpus.load_tokenizer()
    for task in ablation.tasks:
        settings = task.fine_tuning.within(model_shape(loaded.config).positions)
        scores[task.name] = fine_tune(model, task, tokenizer, settings, seed, ablation.device)[
            task.metrics[0]
        ]
    seconds += time.monotonic() - started
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"scores": scores, "seconds": seconds}, indent=2) + "\n")
    return scores


def _record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _train(ablation: _Ablation, variant: Variant, seed: int, folder: Path) -> None:
    """Train a variant with DeepSpeed's launcher; continue an earlier training.

    Raises:
        UserError: the training failed.
    """
    arguments = ablation.arguments
    options: dict[str, object] = {
        "deepspeed_config": arguments.deepspeed_config,
        "teacher": arguments.teacher if variant.has_teacher else "none",
        "data_dir": arguments.data_dir,
        "output_dir": folder / "run",
        "max_steps": arguments.max_steps,
        "seed": seed,
        "train_batch_size": arguments.train_batch_size,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "learning_rate": arguments.learning_rate,
    }
    if not variant.from_layers:
        options["student_config"] = ablation.student_config
    elif not variant.has_teacher:
        options["student"] = ablation.untrained
    elif arguments.student_layers:
        options["student_layers"] = ",".join(map(str, arguments.student_layers))
    flags = [
        str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)
    ]
    ranks = arguments.num_gpus or (None if torch.cuda.is_available() else 1)
    launcher = ["--master_port", str(free_port()), *(["--num_gpus", str(ranks)] if ranks else [])]
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *launcher,
        "--module",
        "distilspeed.launch.train",
    ]
    logger.info("%s, seed %d: training; see %s", variant.name, seed, folder / LOG)
    with (folder / LOG).open("ab") as log:
        status = _run([*command, *flags, *variant.flags, "--resume"], log.fileno())
    if status:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), f"status {status}")
        raise UserError(
            "failed-step", f"the training of {variant.name}, seed {seed}, ended: {reason}; see {folder / LOG}"
        )


def _run(command: Sequence[str], output: int) -> int:
    """Run a command and return its status; if this process gets SIGTERM, the command gets it, too."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process:

        def stop(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)
            raise SystemExit(128 + number)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
