"""What distinguishes the nine tasks of GLUE (Wang et al. 2018): columns, classes, metrics and dev sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from distilspeed.trainer.evaluation.tasks.metrics import (
    Metric,
    accuracy,
    f1,
    matthews_correlation,
    pearson,
    spearman,
)


class DevSet(NamedTuple):
    """A dev set: its names in GLUE's own files and on the hub, and what its metrics' names end with."""

    file: str = "dev.tsv"
    hub: str = "validation"
    suffix: str = ""


@dataclass(frozen=True)
class GlueSpec:
    """A task of GLUE.

    Attributes:
        sentences: the columns with the sentences in the TSV files.
        hub_sentences: the same on the hub.
        label: the column with the label in the TSV files.
        classes: the labels in the TSV files, in the hub's order; () for STS-B, which has scores.
        names: names of the classes on the hub, if the files have numbers.
        header: the columns of files without a header line.
        epochs: as in transformers' run_glue.py, which trains longer on two small tasks than Devlin et al. 2019.
    """

    sentences: tuple[str, ...]
    hub_sentences: tuple[str, ...]
    label: str = "label"
    classes: tuple[str, ...] = ("0", "1")
    names: tuple[str, ...] = ()
    metrics: Mapping[str, Metric] = field(default_factory=lambda: {"accuracy": accuracy})
    dev_sets: tuple[DevSet, ...] = (DevSet(),)
    header: tuple[str, ...] | None = None
    epochs: int = 3


_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_ENTAILMENT = ("entailment", "not_entailment")
_ACCURACY_AND_F1 = {"accuracy": accuracy, "f1": f1}

GLUE_SPECS = {
    "cola": GlueSpec(
        ("sentence",),
        ("sentence",),
        names=("unacceptable", "acceptable"),
        metrics={"matthews_correlation": matthews_correlation},
        header=("source", "label", "authors_mark", "sentence"),
    ),
    "sst2": GlueSpec(("sentence",), ("sentence",), names=("negative", "positive")),
    "mrpc": GlueSpec(
        ("#1 String", "#2 String"),
        _PAIR,
        label="Quality",
        names=("not_equivalent", "equivalent"),
        metrics=_ACCURACY_AND_F1,
        epochs=5,
    ),
    "stsb": GlueSpec(
        _PAIR, _PAIR, label="score", classes=(), metrics={"pearson": pearson, "spearman": spearman}
    ),
    "qqp": GlueSpec(
        _QUESTIONS,
        _QUESTIONS,
        label="is_duplicate",
        names=("not_duplicate", "duplicate"),
        metrics=_ACCURACY_AND_F1,
    ),
    "mnli": GlueSpec(
        _PAIR,
        ("premise", "hypothesis"),
        label="gold_label",
        classes=("entailment", "neutral", "contradiction"),
        dev_sets=(
            DevSet("dev_matched.tsv", "validation_matched"),
            DevSet("dev_mismatched.tsv", "validation_mismatched", "_mismatched"),
        ),
    ),
    "qnli": GlueSpec(("question", "sentence"), ("question", "sentence"), classes=_ENTAILMENT),
    "rte": GlueSpec(_PAIR, _PAIR, classes=_ENTAILMENT),
    "wnli": GlueSpec(_PAIR, _PAIR, names=("not_entailment", "entailment"), epochs=5),
}
