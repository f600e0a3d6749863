"""The model card of a student: how it was trained, for readers and for the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distilspeed.trainer.corpus.format import Corpus
from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.evaluation.token_quality import TokenQuality
from distilspeed.trainer.objective.term import Term
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.load import described_start, public_name
from distilspeed.trainer.training.metrics import StepMetrics


@dataclass(frozen=True)
class TrainingRecord:
    """The facts about a run that its model card states."""

    arguments: TrainArguments
    terms: Sequence[Term]  # the terms that the metrics have values of
    deepspeed_config: ResolvedConfig
    corpus: Corpus
    layers: Sequence[int]
    world_size: int
    last_step: StepMetrics
    held_out: TokenQuality
    changes: Sequence[str] = ()  # settings changed when the run was resumed


def model_card(record: TrainingRecord) -> ModelCard:
    """Return the model card: teacher, data, losses, hyper-parameters, results, and metadata for the hub."""
    return ModelCard(f"---\n{_metadata(record).to_yaml()}\n---\n\n{_text(record)}")


def _metadata(record: TrainingRecord) -> ModelCardData:
    """Return the metadata; without licence and language, because those of the data are unknown."""
    arguments = record.arguments
    # A source without a recorded size is a data set of the hub, NAME[:CONFIG[:SPLIT]].
    sources = record.corpus.manifest.sources
    hub_ids = [source.name.partition(":")[0] for source in sources if source.bytes is None]
    task = record.held_out.hub_task
    results = [
        EvalResult(
            task_type=task,
            task_name=record.held_out.task,
            dataset_type=hub_ids[0] if len(hub_ids) == len(sources) == 1 else "text",
            dataset_name=f"held-out rows of {', '.join(source.name for source in sources)}",
            metric_type=kind,
            metric_value=value,
            metric_name=name,
        )
        for kind, value, name in record.held_out.hub_metrics()
    ]
    models = [arguments.teacher] if arguments.has_teacher else []
    models += [arguments.student] if arguments.student is not None else []
    on_hub = list(dict.fromkeys(model for model in models if not Path(model).exists()))
    return ModelCardData(
        base_model=(on_hub[0] if len(on_hub) == 1 else on_hub) or None,
        datasets=list(dict.fromkeys(hub_ids)) or None,
        eval_results=results,
        library_name="transformers",
        model_name=arguments.output_dir.absolute().name,
        pipeline_tag=task,
        tags=["distilspeed", *(["distillation"] if arguments.has_teacher else [])],
    )


def _text(record: TrainingRecord) -> str:
    arguments, config, last = record.arguments, record.deepspeed_config, record.last_step
    held_out = record.held_out
    optimizer, scheduler = config.optimizer, config.scheduler
    assert optimizer is not None
    parts = ", ".join(f"{term.shown.short} {last.losses[term.name]:.4f}" for term in record.terms)
    rows: list[tuple[str, object]] = []
    start = described_start(arguments, record.layers)
    if arguments.has_teacher:
        rows += [
            ("Teacher", public_name(arguments.teacher)),
            ("Student starts from", start),
            *((term.shown.card, f"{term.weight:g} × {term.described()}") for term in record.terms),
        ]
    else:
        rows += [("Teacher", f"none: {held_out.task.lower()}"), ("Starts from", start)]
    rows += [
        ("Data", ", ".join(source.name for source in record.corpus.manifest.sources)),
        ("Row length", f"{record.corpus.manifest.seq_length} tokens, packed, attention within documents"),
        held_out.labels(arguments.mlm_smoothing),
        ("Real tokens seen", f"{last.tokens:,} in {last.step:,} steps ({last.epoch:.2f} epochs)"),
        ("Global batch", f"{config.batch.train_batch_size} rows on {record.world_size} ranks"),
        ("Optimiser", f"{optimizer.type} {optimizer.params}"),
        ("Schedule", f"{scheduler.type} {scheduler.params}" if scheduler else "constant"),
        ("Gradient clipping", "none" if config.gradient_clipping is None else config.gradient_clipping),
        *(("Changed", change) for change in record.changes),
        ("Seed", arguments.seed),
        (
            "Final training loss",
            f"{last.loss:.4f} ({parts})",
        ),
        (
            "Held-out rows",
            held_out.described(),
        ),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    model = held_out.task.lower().replace("modelling", "model")
    what = "distilled student" if arguments.has_teacher else model
    return f"""# {what.capitalize()}

A {what} trained with distilspeed, after Sanh et al. 2019 (arXiv 1910.01108).
Load it with `{held_out.auto_class}.from_pretrained`.

| | |
|---|---|
{table}
"""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")
