"""Fine-tune a model on a task and export it: the work of launch/finetune.py."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.format import load_tokenizer, tokenizer_hash
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.evaluation.comparison import shown_names
from distilspeed.trainer.evaluation.device_jobs import choose_device
from distilspeed.trainer.evaluation.fine_tuning import FineTuningRun, check_precision
from distilspeed.trainer.evaluation.finetune_arguments import FinetuneArguments
from distilspeed.trainer.evaluation.measurements import model_digest, task_digest
from distilspeed.trainer.evaluation.task_checkpoint import TaskCheckpoint, check_same_settings
from distilspeed.trainer.evaluation.task_distillation import TaskTeacher
from distilspeed.trainer.evaluation.tasks.registry import read_tasks
from distilspeed.trainer.evaluation.tasks.task import FineTuning, Scores, Task, shown_scores
from distilspeed.trainer.files import (
    alone_in,
    bring_back_replaced,
    copy_others,
    folder_written_whole,
    incomplete,
    writing,
)
from distilspeed.trainer.models.flops import model_shape, warn_of_slow_bf16
from distilspeed.trainer.models.inputs import tokenizer_for
from distilspeed.trainer.models.loading import load_fine_tuned, load_with_head

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"
# The hub's name of the task, by transformers' Auto class.
PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}


@dataclass(frozen=True)
class Results:
    """What ``results.json`` says of a run; ``scores`` are those on dev, by metric, 1 is best.

    The digests are of the task's examples, and of the model's and the teacher's weights before the run.
    """

    task: str
    task_digest: str
    scores: Scores
    model: str
    model_digest: str
    teacher: str | None
    teacher_digest: str | None
    temperature: float | None
    alpha_ce: float | None
    alpha_task: float | None
    fine_tuning: FineTuning
    precision: str
    seed: int

    def line(self) -> str:
        return f"{self.task} {shown_scores(self.scores)}"


def finetune(arguments: FinetuneArguments) -> Results:
    """Fine-tune the model, and write it with its tokenizer, model card and results to the output folder.

    Raises:
        UserError: anything the caller can fix, if possible before the training starts.
        NumericalError: a loss or a score is not finite.
    """
    device = choose_device(arguments.device)
    check_precision(arguments.precision, device)
    _check_output_dir(arguments)
    (task,) = read_tasks([arguments.task_name])
    tokenizer = load_tokenizer(arguments.model)
    torch.manual_seed(arguments.seed)
    model = nn.Module.to(load_with_head(arguments.model, task.head), device)
    teacher = _load_teacher(arguments, task, tokenizer, device)
    settings = _settings(arguments, task, model, teacher)
    for warning in task.warnings():
        logger.warning(warning)
    shown_model, *shown_teacher = shown_names(
        [arguments.model, *([arguments.teacher] if arguments.teacher else [])]
    )
    results = Results(
        task=task.name,
        task_digest=task_digest(task),
        scores={},
        model=shown_model,
        model_digest=model_digest(model),
        teacher=shown_teacher[0] if shown_teacher else None,
        teacher_digest=model_digest(teacher.model) if teacher else None,
        temperature=arguments.temperature if teacher else None,
        alpha_ce=arguments.alpha_ce if teacher else None,
        alpha_task=arguments.alpha_task if teacher else None,
        fine_tuning=settings,
        precision=arguments.precision,
        seed=arguments.seed,
    )
    identity = {name: value for name, value in asdict(results).items() if name != "scores"}
    with alone_in(arguments.output_dir):
        _check_output_dir(arguments)  # again, because another run may have started in the folder
        if (arguments.output_dir / RESULTS).exists():
            return _finished(arguments.output_dir / RESULTS, identity)
        checkpoint = TaskCheckpoint(arguments.output_dir / CHECKPOINT, identity, arguments.save_steps)
        run = FineTuningRun(
            task, tokenizer, settings, arguments.seed, arguments.precision, teacher, checkpoint
        )
        warn_of_slow_bf16(arguments.precision, device)
        run.train(model)
        results = replace(results, scores=run.score(model, arguments.model))
        with (
            writing(arguments.output_dir),
            folder_written_whole(arguments.output_dir, replaces=True) as folder,
        ):
            # Whatever else lies in the folder, for example a log.
            copy_others(arguments.output_dir, folder, checkpoint.path, keeps=False)
            model.save_pretrained(folder)
            tokenizer_for(model, tokenizer).save_pretrained(folder)
            _model_card(results, task, arguments).save(folder / "README.md")
            text = json.dumps(asdict(results), indent=2, allow_nan=False) + "\n"
            (folder / RESULTS).write_text(text, encoding="utf-8")
    return results


def _check_output_dir(arguments: FinetuneArguments) -> None:
    """Raise a UserError unless the output folder is new or empty, or holds a run to resume."""
    folder = arguments.output_dir
    with writing(folder):
        bring_back_replaced(folder)
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    of_run = {CHECKPOINT, RESULTS, incomplete(folder / CHECKPOINT).name}
    if found and not (arguments.resume and found & of_run):
        raise UserError(
            "output-exists", f"{folder} is not empty; continue with --resume, or choose another --output_dir"
        )


def _finished(path: Path, identity: Mapping[str, Any]) -> Results:
    """Return the results of a finished run.

    Raises:
        UserError: they are of a run with other settings.
    """
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_same_settings(path, saved, identity)
    logger.info("%s is complete", path.parent)
    return Results(**{**saved, "fine_tuning": FineTuning(**saved["fine_tuning"])})


def _load_teacher(
    arguments: FinetuneArguments, task: Task, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> TaskTeacher | None:
    if arguments.teacher is None:
        return None
    teacher = nn.Module.to(load_fine_tuned(arguments.teacher, task.head), device)
    if tokenizer_hash(load_tokenizer(arguments.teacher)) != tokenizer_hash(tokenizer):
        raise UserError(
            "tokenizer-mismatch",
            f"the teacher {arguments.teacher} has another tokenizer than the model {arguments.model}; choose a "
            "teacher with the same tokenizer",
        )
    return TaskTeacher(teacher, arguments.temperature, arguments.alpha_ce, arguments.alpha_task)


def _settings(
    arguments: FinetuneArguments, task: Task, model: PreTrainedModel, teacher: TaskTeacher | None
) -> FineTuning:
    """Return the settings: the command's, else the task's; inputs fit the positions of both models."""
    own = task.fine_tuning
    positions = [model_shape(each.config).positions for each in (model, teacher.model if teacher else model)]
    return FineTuning(
        epochs=arguments.num_train_epochs or own.epochs,
        learning_rate=arguments.learning_rate or own.learning_rate,
        batch_size=arguments.per_device_train_batch_size or own.batch_size,
        max_length=arguments.max_seq_length or own.max_length,
    ).within(min(positions))


def _model_card(results: Results, task: Task, arguments: FinetuneArguments) -> ModelCard:
    kind = PIPELINES.get(task.head.model_class.__name__, "other")
    metadata = ModelCardData(
        base_model=None if Path(arguments.model).exists() else arguments.model,
        eval_results=[
            EvalResult(
                task_type=kind,
                dataset_type=results.task,
                dataset_name=f"{results.task}, dev",
                metric_type=metric,
                metric_value=score,
            )
            for metric, score in results.scores.items()
        ],
        library_name="transformers",
        model_name=arguments.output_dir.absolute().name,
        pipeline_tag=kind,
        tags=["distilspeed", *(["distillation"] if results.teacher else [])],
    )
    how = results.fine_tuning
    rows = {
        "Model": results.model,
        "Task": f"{results.task}, {len(task.train):,} training examples",
        "Teacher": f"{results.teacher}, temperature {results.temperature:g}, {results.alpha_ce:g} × soft targets + "
        f"{results.alpha_task:g} × labels"
        if results.teacher
        else "none",
        "Fine-tuning": f"{how.epochs} epochs, learning rate {how.learning_rate:g}, batch {how.batch_size}, at most "
        f"{how.max_length} tokens, {results.precision}, seed {results.seed}",
        "Scores on dev": shown_scores(results.scores),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = f"# {results.task}\n\nFine-tuned with distilspeed.\n\n| | |\n|---|---|\n{table}\n"
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")
