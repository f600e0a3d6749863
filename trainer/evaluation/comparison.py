"""Compare a student, and baselines, with the teacher: the work of launch/evaluate.py.

Every model sees the same masks and the same examples, in float32 except in fine-tuning, if that is asked for. Forward
passes are timed in turns.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.arguments import ComparisonArguments, EvaluateArguments
from distilspeed.trainer.evaluation.device_jobs import choose_device, jobs_at_a_time
from distilspeed.trainer.evaluation.fill_mask import check_texts, fill_mask
from distilspeed.trainer.evaluation.fine_tuning import check_precision, fine_tune
from distilspeed.trainer.evaluation.latency import (
    Latency,
    count_parameters,
    latency_inputs,
    measure_latency,
)
from distilspeed.trainer.evaluation.measurements import (
    EXAMPLES,
    MEASUREMENTS,
    MeasurementsFile,
    ModelMeasurements,
    corpus_digest,
    model_digest,
    task_digest,
)
from distilspeed.trainer.evaluation.quality import measure_held_out
from distilspeed.trainer.evaluation.report import (
    EvaluationConditions,
    ModelReport,
    Report,
    TaskScore,
    percent_of,
)
from distilspeed.trainer.evaluation.report_files import write_report
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.task import FineTuning, Scores, Task
from distilspeed.trainer.files import (
    alone_in,
    bring_back_replaced,
    check_unoccupied,
    copy_others,
    folder_written_whole,
    writing,
)
from distilspeed.trainer.models.flops import model_shape, warn_of_slow_bf16
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_language_model,
    make_with_head,
    warn_without_tokenizer,
)

logger = logging.getLogger(__name__)

# What may change when an evaluation is resumed. Paths may, because contents are compared.
PATHS = ("teacher", "student", "baseline", "data_dir", "task", "glue_dir", "output_dir")
CHANGEABLE = (*PATHS, "num_gpus", "resume")
SHOWN_PARTS = 2  # parts of a model's path in the report, at least
LONGEST_NAME = 60  # characters


# --- checks before the comparison -----------------------------------------------------------------------


def _check_output_dir(output_dir: Path, resume: bool) -> None:
    with writing(output_dir):
        if resume:
            bring_back_replaced(output_dir)
        is_started = any(output_dir.glob(f"*{MEASUREMENTS}*"))  # also one killed while it wrote them
    if not is_started:
        check_unoccupied(output_dir)
    elif not resume:
        raise UserError(
            "output-exists",
            f"{output_dir} is not empty; continue with --resume, or choose another --output_dir",
        )
    nearest = next(folder for folder in output_dir.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            "unwritable-output", f"cannot create {output_dir} in {nearest}; choose another --output_dir"
        )


# --- the comparison -------------------------------------------------------------------------------------


def evaluate(arguments: EvaluateArguments) -> Report:
    """Compare the models and write report.json, report.md and report.png to the output folder.

    Every measurement is written to measurements.json in the same folder, so a killed evaluation can be resumed.

    Raises:
        UserError: anything the caller can fix, if possible before the first measurement.
        NumericalError: a model's loss on the held-out rows, or a score on a task, is not finite.
    """
    device = choose_device(arguments.device)
    at_a_time = jobs_at_a_time(arguments.num_gpus, device)
    check_precision(arguments.task_precision, device)
    _check_output_dir(arguments.output_dir, arguments.resume)
    tasks = read_tasks(arguments.task_names)
    corpus = open_corpus(arguments.data_dir)
    check_tasks_fit(tasks, corpus)
    models = [load_language_model(role, name) for role, name in arguments.models.items()]
    for (role, name), model in zip(arguments.models.items(), models, strict=True):
        check_fits_corpus(role, name, model, corpus)
        for task in tasks:
            with torch.device("meta"):
                make_with_head(role, name, task.head)
    for role, name in arguments.models.items():
        warn_without_tokenizer(role, name)
    for task in tasks:
        for warning in task.warnings():
            logger.warning(warning)
    positions = min(model_shape(model.config).positions for model in models)
    check_texts(arguments.fill_mask, corpus, positions)
    settings = [fine_tuning_settings(arguments, task, positions) for task in tasks]
    with alone_in(arguments.output_dir):
        # Again, because another evaluation may have started in the folder.
        _check_output_dir(arguments.output_dir, arguments.resume)
        file = MeasurementsFile(
            arguments.output_dir / MEASUREMENTS, _identity(arguments, corpus, models, tasks, device)
        )
        measured, machine = file.models(
            lambda: _measure_models(arguments, corpus, models, positions, device), device
        )
        if device.type == "cuda":  # the fine-tuned models need the memory
            for model in models:
                nn.Module.to(model, "cpu")
            torch.cuda.empty_cache()
        if tasks:
            warn_of_slow_bf16(arguments.task_precision, device)
        scores = _fine_tune_all(
            _Runs(arguments, corpus.load_tokenizer(), device, at_a_time, file), tasks, settings
        )
        report = Report(
            models=tuple(_model_reports(arguments, models, measured, scores)),
            conditions=EvaluationConditions(
                corpus=arguments.data_dir.resolve().name,
                held_out_rows=min(arguments.max_rows, len(corpus.held_out)),
                seq_length=corpus.manifest.seq_length,
                seed=arguments.seed,
                fill_mask=arguments.fill_mask,
                tasks=tuple(task.conditions(how) for task, how in zip(tasks, settings, strict=True)),
                task_seeds=arguments.task_seeds,
                task_learning_rates=arguments.task_learning_rates,
                task_precision=arguments.task_precision,
            ),
            machine=machine,
        )
        with (
            writing(arguments.output_dir),
            folder_written_whole(arguments.output_dir, replaces=True) as folder,
        ):
            # The measurements, and whatever else lies in the folder, for example a log.
            copy_others(arguments.output_dir, folder, file.path, keeps=True)
            write_report(report, folder)
        return report


def check_tasks_fit(tasks: Sequence[Task], corpus: Corpus) -> None:
    if tasks and corpus.manifest.objective == "causal":
        raise UserError(
            "conflicting-arguments",
            f"--task fine-tunes encoders, but the corpus {corpus.path} is for causal language models; omit --task",
        )


def _identity(
    arguments: EvaluateArguments,
    corpus: Corpus,
    models: Sequence[PreTrainedModel],
    tasks: Sequence[Task],
    device: torch.device,
) -> dict[str, str]:
    """Return the settings and inputs that must not change when the evaluation is resumed."""
    settings = {name: str(value) for name, value in asdict(arguments).items() if name not in CHANGEABLE}
    return {
        **settings,
        "device": device.type,
        "models": ", ".join(arguments.models),
        "corpus": corpus_digest(corpus),
        **{
            f"weights of the {role}": model_digest(model)
            for role, model in zip(arguments.models, models, strict=True)
        },
        **{f"{EXAMPLES}{task.name}": task_digest(task) for task in tasks},
    }


def fine_tuning_settings(arguments: ComparisonArguments, task: Task, positions: int) -> FineTuning:
    """Return the settings of fine-tuning: the command's, else the task's; inputs have at most ``positions`` tokens."""
    own = task.fine_tuning
    return FineTuning(
        epochs=arguments.task_epochs or own.epochs,
        learning_rate=(arguments.task_learning_rates or (own.learning_rate,))[0],
        batch_size=arguments.task_batch_size or own.batch_size,
        max_length=own.max_length,
    ).within(positions)


def _model_reports(
    arguments: EvaluateArguments,
    models: Sequence[PreTrainedModel],
    measured: Sequence[ModelMeasurements],
    scores: Sequence[Sequence[TaskScore]],
) -> Iterator[ModelReport]:
    """Yield one report per model, in the order of ``arguments.models``; ``scores``: for each task, of each model."""
    names = shown_names(list(arguments.models.values()))
    for index, role in enumerate(arguments.models):
        parameters = count_parameters(models[index])
        yield ModelReport(
            role=role,
            name=names[index],
            parameters=parameters,
            parameters_percent=100 * parameters / count_parameters(models[0]),
            quality=measured[index].quality,
            retention_percent=percent_of(measured[index].quality.accuracy, measured[0].quality.accuracy),
            teacher_agreement=measured[index].teacher_agreement,
            latencies=measured[index].latencies,
            guesses=measured[index].guesses,
            tasks=tuple(of_task[index] for of_task in scores),
        )


def _measure_models(
    arguments: EvaluateArguments,
    corpus: Corpus,
    models: Sequence[PreTrainedModel],
    positions: int,
    device: torch.device,
) -> tuple[ModelMeasurements, ...]:
    latencies = _measure_latencies(models, latency_inputs(corpus, positions), device)
    held_out = []
    for role, model in zip(arguments.models, models, strict=True):
        logger.info("held-out rows: %s", role)
        held_out.append(measure_held_out(model, corpus, arguments.max_rows, seed=arguments.seed))
    _, of_teacher = held_out[0]
    tokenizer = corpus.load_tokenizer()
    return tuple(
        ModelMeasurements(
            quality,
            predictions.agreement(of_teacher),
            of_model,
            fill_mask(model, tokenizer, arguments.fill_mask),
        )
        for model, (quality, predictions), of_model in zip(
            models, held_out, zip(*latencies, strict=True), strict=True
        )
    )


def _measure_latencies(
    models: Sequence[PreTrainedModel], inputs: Sequence[torch.Tensor], device: torch.device
) -> list[list[Latency]]:
    """Return the latencies of all models for each input, on the CPU and on the GPU if used.

    Leaves the models on ``device``.
    """
    latencies = []
    for place in dict.fromkeys([torch.device("cpu"), device]):
        name = "CPU" if place.type == "cpu" else "GPU"
        for input_ids in inputs:
            logger.info("latency: %s, %d × %d tokens", name, *input_ids.shape)
            times = measure_latency(models, input_ids, place)
            latencies.append([Latency.of(name, input_ids.shape, of_model, times[0]) for of_model in times])
    return latencies


@dataclass(frozen=True)
class _Run:
    """One fine-tuning of the model with a role."""

    task: Task
    role: str
    settings: FineTuning
    seed: int

    @property
    def name(self) -> str:
        rate = self.settings.learning_rate
        return f"{self.task.name}, {self.role}, learning rate {rate!r}, seed {self.seed}"


@dataclass(frozen=True)
class _Runs:
    """Does fine-tuning runs once; their scores are in the file of measurements."""

    arguments: EvaluateArguments
    tokenizer: PreTrainedTokenizerFast
    device: torch.device
    at_a_time: int
    file: MeasurementsFile

    def scores(self, runs: Iterable[_Run]) -> Mapping[str, Scores]:
        """Return the scores of the runs, and of all earlier ones, by the names of the runs."""
        jobs = {run.name: self._job(run) for run in runs}
        return self.file.runs(jobs, self.device, self.at_a_time)

    def _job(self, run: _Run) -> Callable[[torch.device], Scores]:
        model, precision = self.arguments.models[run.role], self.arguments.task_precision
        return partial(
            fine_tune, model, run.task, self.tokenizer, run.settings, run.seed, precision=precision
        )


def _fine_tune_all(
    runs: _Runs, tasks: Sequence[Task], settings: Sequence[FineTuning]
) -> list[list[TaskScore]]:
    """Fine-tune every model on every task with the same seeds; return the scores of each task, by model."""
    arguments = runs.arguments
    tried = {
        (task.name, role): [
            _Run(task, role, replace(how, learning_rate=rate), arguments.seed)
            for rate in arguments.task_learning_rates or (how.learning_rate,)
        ]
        for task, how in zip(tasks, settings, strict=True)
        for role in arguments.models
    }
    scores = runs.scores(chain(*tried.values()))
    best = {
        key: max(of_key, key=lambda run: scores[run.name][run.task.metrics[0]])
        for key, of_key in tried.items()
    }
    seeds = range(arguments.seed, arguments.seed + arguments.task_seeds)
    repeated = {key: [replace(run, seed=seed) for seed in seeds] for key, run in best.items()}
    scores = runs.scores(chain(*repeated.values()))

    def scores_on(task: str) -> list[TaskScore]:
        of_models = [[scores[run.name] for run in repeated[task, role]] for role in arguments.models]
        return [
            TaskScore.of(task, of_model, of_models[0], best[task, role].settings.learning_rate)
            for role, of_model in zip(arguments.models, of_models, strict=True)
        ]

    return [scores_on(task.name) for task in tasks]


def shown_names(names: Sequence[str]) -> list[str]:
    """Return the names of models in the report: hub ids unchanged, folders with as few parents as make them unique.

    A folder keeps at least one parent, because many are called "student" or "checkpoint-1000". It keeps no more than
    needed, because the path of a machine does not belong in a report.
    """
    paths = [Path(name).resolve().parts for name in names]
    parts = SHOWN_PARTS
    while len({path[-parts:] for path in paths}) < len(set(paths)):
        parts += 1
    shown = [
        "/".join(path[-parts:]).replace("//", "/") if Path(name).exists() else name
        for name, path in zip(names, paths, strict=True)
    ]
    return [f"…{name[-LONGEST_NAME:]}" if len(name) > LONGEST_NAME else name for name in shown]
