"""A causal model is measured by perplexity and next-token accuracy, in report and model card, too."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import Corpus, open_corpus, read_rows
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.evaluation.arguments import EvaluateArguments
from distilspeed.trainer.evaluation.comparison import evaluate
from distilspeed.trainer.evaluation.quality import held_out_quality
from distilspeed.trainer.evaluation.token_quality import NextTokenQuality
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.objective.registry import take_terms
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.metrics import StepMetrics
from distilspeed.trainer.training.model_card import TrainingRecord, model_card

ROWS = 5


@pytest.fixture(scope="module")
def folders(family_dirs: Callable[[str], Any]) -> Any:
    return family_dirs("gpt2")


@pytest.fixture(scope="module")
def corpus(folders: Any) -> Corpus:
    return open_corpus(folders.corpus)


def test_perplexity_and_accuracy_are_those_of_transformers_on_each_document(
    folders: Any, corpus: Corpus
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folders.teacher).double().eval()
    losses, hits = [], []
    stored = read_rows(corpus.held_out, [row * len(corpus.held_out) // ROWS for row in range(ROWS)])
    for row, lengths in zip(stored.input_ids, stored.document_lengths, strict=True):
        for document in np.split(row, np.cumsum(lengths))[:-1]:
            ids = torch.from_numpy(document)[None]
            with torch.no_grad():
                output = plain(ids, labels=ids)
            losses += [output.loss.item()] * (len(document) - 1)
            hits += (output.logits[0, :-1].argmax(-1) == ids[0, 1:]).tolist()
    model = load_teacher(str(folders.teacher))
    found = held_out_quality(model, corpus, ROWS)
    assert isinstance(found, NextTokenQuality)
    assert found.predicted_tokens == len(hits)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found.accuracy == pytest.approx(np.mean(hits))
    assert held_out_quality(model, corpus, ROWS, batch_size=3).loss == pytest.approx(found.loss, rel=1e-6)


def test_a_report_shows_both_perplexities_and_the_retention_of_accuracy(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.SECONDS", 0.05)
    make_student(load_teacher(str(folders.teacher)), (0, 3)).save_pretrained(tmp_path / "student")
    arguments = EvaluateArguments(
        teacher=str(folders.teacher),
        student=str(tmp_path / "student"),
        data_dir=folders.corpus,
        output_dir=tmp_path / "report",
        max_rows=1000,  # enough that the teacher, which is random, predicts a token
        device="cpu",
    )
    report = evaluate(arguments)
    teacher, student = report.models
    heading, _, *rows = report.table().splitlines()
    assert "| held-out perplexity | next-token accuracy | retention |" in heading
    for model, row in zip(report.models, rows, strict=True):
        assert f"| {model.quality.perplexity:.2f} |" in row
    assert student.retention_percent == pytest.approx(
        100 * student.quality.accuracy / teacher.quality.accuracy
    )
    written = json.loads((tmp_path / "report" / "report.json").read_text())["models"][1]
    assert written["clm_retention_percent"] == student.retention_percent
    assert written["quality"]["perplexity"] == student.quality.perplexity
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "mask" not in markdown.lower()
    assert "MLM" not in markdown


def test_tasks_are_refused(folders: Any, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "task" / f"{name}.jsonl").write_text(
            '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
        )
    arguments = EvaluateArguments(
        teacher=str(folders.teacher),
        student=str(folders.teacher),
        data_dir=folders.corpus,
        output_dir=tmp_path / "report",
        task=(str(tmp_path / "task"),),
    )
    with raises_user_error("conflicting-arguments", "--task"):
        evaluate(arguments)


@pytest.mark.parametrize("teacher", ["openai-community/gpt2", "none"])
def test_the_model_card_describes_a_causal_model(corpus: Corpus, teacher: str) -> None:
    last = StepMetrics(
        10, 1.0, 1000, 8.0, {"ce": 1.0, "clm": 2.0, "cos": 0.5}, 0.0, 1.0, 1.0, 0, 100.0, 0.1, 0.0
    )
    record = TrainingRecord(
        arguments=TrainArguments(
            deepspeed_config=Path("config.json"),
            teacher=teacher,
            data_dir=corpus.path,
            output_dir=Path("runs") / "small",
            student_config="config.json" if teacher == "none" else None,
        ),
        terms=take_terms({}, "causal"),
        deepspeed_config=ResolvedConfig({"optimizer": {"type": "AdamW"}}, BatchEquation(16, 8, 1, 2)),
        corpus=replace(corpus, manifest=corpus.manifest),
        layers=(0, 3),
        world_size=2,
        last_step=last,
        held_out=NextTokenQuality(loss=3.0, perplexity=20.0855, accuracy=0.25, predicted_tokens=1234),
    )
    card = model_card(record)
    assert card.data.pipeline_tag == "text-generation"
    assert [result.metric_type for result in card.data.eval_results] == ["perplexity", "accuracy", "loss"]
    assert {result.task_name for result in card.data.eval_results} == {"Causal language modelling"}
    for line in (
        "| Held-out rows | perplexity 20.09, CLM loss 3.0000, accuracy 25.0% of 1,234 next tokens |",
        "CLM 2.0000",
        "AutoModelForCausalLM",
        "# Causal language model\n"
        if teacher == "none"
        else "| Causal language modelling | 0.5 × cross-entropy",
    ):
        assert line in card.text
    assert "mask" not in card.text.lower()
