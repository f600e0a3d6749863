"""Train and evaluate the variants of an ablation: the work of launch/ablation.py.

student_config/       the student's config, for random weights
untrained_student/    the teacher's layers as a model
VARIANT/seed_N/       run/, a run of launch/train.py; train.log, its output; scores.json, its scores so far
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.config_file import read_deepspeed_config
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.ablation import (
    ACCURACY,
    FULL,
    AblationReport,
    Scores,
    Variant,
    VariantResult,
    variants,
    with_task_mean,
    write_ablation,
)
from distilspeed.trainer.evaluation.ablation_arguments import AblationArguments
from distilspeed.trainer.evaluation.comparison import check_tasks_fit, fine_tuning_settings
from distilspeed.trainer.evaluation.device_jobs import choose_device, jobs_at_a_time, run_jobs
from distilspeed.trainer.evaluation.fine_tuning import check_precision, fine_tune
from distilspeed.trainer.evaluation.measurements import (
    EXAMPLES,
    corpus_digest,
    digest,
    model_digest,
    task_digest,
)
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.evaluation.report import Environment
from distilspeed.trainer.evaluation.task_checkpoint import check_same_settings
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.task import FineTuning, Task
from distilspeed.trainer.files import (
    alone_in,
    check_unoccupied,
    folder_written_whole,
    incomplete,
    write_text,
    writing,
)
from distilspeed.trainer.job.processes import exit_on_sigterm
from distilspeed.trainer.job.ranks import free_port
from distilspeed.trainer.models.flops import model_shape, warn_of_slow_bf16
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

TEACHER = "teacher"
SETTINGS, SCORES, LOG = "ablation_arguments.json", "scores.json", "train.log"
# What may change when an ablation goes on: seeds and variants are added.
CHANGEABLE = ("output_dir", "seeds", "variants", "num_gpus", "device")
COMPARED_BY_CONTENT = ("teacher", "data_dir", "deepspeed_config", "task", "glue_dir")


@dataclass(frozen=True)
class _Ablation:
    """The inputs of an ablation, loaded and checked."""

    arguments: AblationArguments
    corpus: Corpus
    tasks: Sequence[Task]
    chosen: Sequence[Variant]
    device: torch.device
    at_a_time: int  # fine-tuning runs

    def folder(self, variant: str, seed: int) -> Path:
        return self.arguments.output_dir / variant / f"seed_{seed}"

    def record(self, name: str, seed: int) -> "_Record":
        return _Record(self.folder(name, seed) / SCORES)

    def model(self, name: str, seed: int) -> str:
        """Return the teacher, or the student of a variant."""
        if name == TEACHER:
            return self.arguments.teacher
        is_trained = next(variant for variant in self.chosen if variant.name == name).is_trained
        return str(self.folder(name, seed) / "run" / "student" if is_trained else self.untrained)

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
    device = choose_device(arguments.device)
    check_precision(arguments.task_precision, device)
    config = read_deepspeed_config(arguments.deepspeed_config)
    corpus = open_corpus(arguments.data_dir)
    teacher = load_teacher(arguments.teacher)
    check_fits_corpus("teacher", arguments.teacher, teacher, corpus)
    ablation = _Ablation(
        arguments,
        corpus,
        read_tasks(arguments.task_names),
        _chosen_variants(arguments.variants, corpus.manifest.objective),
        device,
        jobs_at_a_time(arguments.num_gpus, device),
    )
    check_tasks_fit(ablation.tasks, corpus)
    identity = _identity(ablation, config, teacher)
    _check_settings(arguments.output_dir, identity)
    student = make_student(teacher, select_teacher_layers(teacher.config, arguments.student_layers))
    del teacher
    with alone_in(arguments.output_dir):
        # Again, because another ablation may have started in the folder.
        _check_settings(arguments.output_dir, identity)
        if not ablation.untrained.exists():
            _write_students(ablation, identity, student)
        return _train_and_evaluate(ablation)


def _train_and_evaluate(ablation: _Ablation) -> AblationReport:
    arguments = ablation.arguments
    positions = model_shape(AutoConfig.from_pretrained(ablation.student_config)).positions
    settings = [fine_tuning_settings(arguments, task, positions) for task in ablation.tasks]
    warn_of_slow_bf16(arguments.task_precision, ablation.device)
    _evaluate(ablation, [TEACHER], settings)  # first, because it shows early whether the tasks can be used
    for variant, seed in product(ablation.chosen, range(arguments.seeds)):
        _train_once(ablation, variant, seed)
    _evaluate(ablation, [variant.name for variant in ablation.chosen], settings)
    report = AblationReport(
        teacher=_scores(ablation, TEACHER),
        results=tuple(
            VariantResult(variant.name, variant.title, _scores(ablation, variant.name))
            for variant in ablation.chosen
        ),
        max_steps=arguments.max_steps,
        tokens=read_metrics(ablation.folder(FULL.name, 0) / "run" / "metrics.jsonl")[-1].tokens,
        tasks=tuple(task.conditions(how) for task, how in zip(ablation.tasks, settings, strict=True)),
        task_learning_rates=arguments.task_learning_rates,
        task_precision=arguments.task_precision,
        seconds=sum(_Record(path).seconds for path in arguments.output_dir.rglob(SCORES)),
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


def _identity(ablation: _Ablation, config: DeepSpeedConfig, teacher: PreTrainedModel) -> dict[str, str]:
    """Return the settings and inputs that must not change when the ablation goes on."""
    settings = asdict(ablation.arguments).items()
    return {
        **{name: str(value) for name, value in settings if name not in (*CHANGEABLE, *COMPARED_BY_CONTENT)},
        "deepspeed_config": digest(json.dumps(config.to_dict(), sort_keys=True)),
        "corpus": corpus_digest(ablation.corpus),
        "weights of the teacher": model_digest(teacher),
        **{f"{EXAMPLES}{task.name}": task_digest(task) for task in ablation.tasks},
    }


def _check_settings(output_dir: Path, identity: Mapping[str, str]) -> None:
    """Compare the settings with those of the earlier calls.

    Raises:
        UserError: they differ, or the output folder holds something else.
    """
    path = output_dir / SETTINGS
    if path.exists():
        check_same_settings(path, json.loads(path.read_text(encoding="utf-8")), identity)
    elif not incomplete(path).exists():
        check_unoccupied(output_dir)


def _write_students(ablation: _Ablation, identity: Mapping[str, str], student: PreTrainedModel) -> None:
    """Write the settings, the student's config, and the student as it is before any training."""
    folder = ablation.arguments.output_dir
    with writing(folder):
        write_text(folder / SETTINGS, json.dumps(identity, indent=2) + "\n")
        student.config.save_pretrained(ablation.student_config)
        with folder_written_whole(ablation.untrained) as untrained:
            student.save_pretrained(untrained)
            tokenizer_for(student, ablation.corpus.load_tokenizer()).save_pretrained(untrained)


# --- what is done once ---------------------------------------------------------------------------------


class _Record:
    """The scores of one model, by column, and the seconds they took; in scores.json, written after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.scores: dict[str, float] = found.get("scores", {})
        self.seconds: float = found.get("seconds", 0.0)

    def add(self, scores: Mapping[str, float], seconds: float) -> None:
        self.scores |= scores
        self.seconds += seconds
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"scores": self.scores, "seconds": self.seconds}, indent=2)
            write_text(self.path, text + "\n")


def _scores(ablation: _Ablation, name: str) -> tuple[Scores, ...]:
    """Return the recorded scores of a variant or the teacher, for every seed, in the order of the report."""
    columns = [ACCURACY, *(task.name for task in ablation.tasks)]
    records = [ablation.record(name, seed) for seed in range(ablation.arguments.seeds)]
    return tuple(with_task_mean({column: record.scores[column] for column in columns}) for record in records)


def _train_once(ablation: _Ablation, variant: Variant, seed: int) -> None:
    """Train a variant unless its record says that it is trained."""
    record = ablation.record(variant.name, seed)
    if variant.is_trained and not record.path.exists():
        started = time.monotonic()
        record.path.parent.mkdir(parents=True, exist_ok=True)
        _train(ablation, variant, seed, record.path.parent)
        record.add({}, time.monotonic() - started)


def _evaluate(ablation: _Ablation, names: Sequence[str], settings: Sequence[FineTuning]) -> None:
    """Measure what is missing in the records of models.

    Args:
        names: of variants, or the teacher.
        settings: of fine-tuning, for each task.
    """
    arguments, tokenizer = ablation.arguments, ablation.corpus.load_tokenizer()
    accuracies: dict[str, float] = {}  # by model: the teacher is the same for all seeds
    jobs: dict[tuple[str, int, str], Callable[[torch.device], tuple[float, float]]] = {}
    for name, seed in product(names, range(arguments.seeds)):
        model, record = ablation.model(name, seed), ablation.record(name, seed)
        if ACCURACY not in record.scores:
            started = time.monotonic()
            if model not in accuracies:
                logger.info("%s, seed %d: held-out rows", name, seed)
                accuracies[model] = _held_out_accuracy(ablation, name, model)
            record.add({ACCURACY: accuracies[model]}, time.monotonic() - started)
        for task, how in zip(ablation.tasks, settings, strict=True):
            if task.name not in record.scores:
                jobs[name, seed, task.name] = partial(
                    _score_on_task,
                    model=model,
                    task=task,
                    tokenizer=tokenizer,
                    settings=how,
                    rates=arguments.task_learning_rates or (how.learning_rate,),
                    seed=seed,
                    precision=arguments.task_precision,
                )
    for (name, seed, task_name), (score, seconds) in run_jobs(jobs, ablation.device, ablation.at_a_time):
        logger.info("%s, seed %d: %s %.1f %%", name, seed, task_name, 100 * score)
        ablation.record(name, seed).add({task_name: score}, seconds)


def _held_out_accuracy(ablation: _Ablation, name: str, model: str) -> float:
    loaded = nn.Module.to(load_language_model(name, model), ablation.device)
    return held_out_quality(loaded, ablation.corpus, ablation.arguments.max_rows).accuracy


def _score_on_task(
    device: torch.device,
    *,
    model: str,
    task: Task,
    tokenizer: PreTrainedTokenizerFast,
    settings: FineTuning,
    rates: Sequence[float],
    seed: int,
    precision: str,
) -> tuple[float, float]:
    """Return a model's score in the task's first metric, with the rate that is best on dev, and the seconds."""
    started = time.monotonic()

    def score(rate: float) -> float:
        of_rate = replace(settings, learning_rate=rate)
        return fine_tune(model, task, tokenizer, of_rate, seed, device, precision)[task.metrics[0]]

    return max(map(score, rates)), time.monotonic() - started


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
        "mlm_smoothing": arguments.mlm_smoothing,
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
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
        exit_on_sigterm(),
    ):
        try:
            return process.wait()
        except SystemExit:
            process.terminate()
            raise
