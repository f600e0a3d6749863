"""Promises of the model card: its metadata gives results, data and teacher to the hub, and states only known facts."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distilspeed.trainer.corpus.format import Corpus, SourceRecord
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.evaluation.token_quality import MaskedTokenQuality
from distilspeed.trainer.objective.registry import take_terms
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.metrics import StepMetrics
from distilspeed.trainer.training.model_card import TrainingRecord, model_card

WIKIPEDIA = SourceRecord("wikimedia/wikipedia:20231101.en", None)
BOOKS = SourceRecord("bookcorpus/bookcorpus", None)
OWN_TEXT = SourceRecord("own.txt", 1000)
LAST_STEP = StepMetrics(
    step=10,
    epoch=1.0,
    tokens=1000,
    loss=8.0,
    losses={"ce": 1.0, "mlm": 2.0, "cos": 0.5},
    lr=0.0,
    grad_norm=1.0,
    loss_scale=1.0,
    skipped=0,
    tokens_per_s=100.0,
    mfu=0.1,
    time=0.0,
)


def card_of(corpus: Corpus, teacher: str, *sources: SourceRecord, student: str | None = None) -> ModelCard:
    arguments = TrainArguments(
        deepspeed_config=Path("config.json"),
        teacher=teacher,
        data_dir=corpus.path,
        output_dir=Path("runs") / "small",
        student=student,
        student_config="config.json" if teacher == "none" and student is None else None,
    )
    record = TrainingRecord(
        arguments=arguments,
        terms=take_terms({}),
        deepspeed_config=ResolvedConfig({"optimizer": {"type": "AdamW"}}, BatchEquation(16, 8, 1, 2)),
        corpus=replace(corpus, manifest=replace(corpus.manifest, sources=sources)),
        layers=(0, 3),
        world_size=2,
        last_step=LAST_STEP,
        held_out=MaskedTokenQuality(
            loss=2.123456789,
            accuracy=0.612345678,
            masked_tokens=1234,
            training_masks_loss=2.987654321,
            training_masks_accuracy=0.456,
        ),
    )
    return model_card(record)


@pytest.fixture
def saved(corpus: Corpus, tmp_path: Path) -> ModelCard:
    card_of(corpus, "google-bert/bert-base-uncased", WIKIPEDIA, BOOKS, OWN_TEXT).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_the_results_on_held_out_rows_are_read_back(saved: ModelCard) -> None:
    assert saved.data.model_name == "small"
    accuracy, loss = saved.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.612345678)
    assert (loss.metric_type, loss.metric_value) == ("loss", 2.123456789)
    for result in (accuracy, loss):
        assert result.task_type == saved.data.pipeline_tag == "fill-mask"
        for source in (WIKIPEDIA, BOOKS, OWN_TEXT):
            assert source.name in result.dataset_name


def test_hub_teachers_and_data_sets_are_named_by_their_ids(saved: ModelCard) -> None:
    assert saved.data.base_model == "google-bert/bert-base-uncased"
    assert saved.data.datasets == ["wikimedia/wikipedia", "bookcorpus/bookcorpus"]
    assert saved.data.tags == ["distilspeed", "distillation"]
    assert saved.data.library_name == "transformers"


@pytest.mark.parametrize(
    ("teacher", "student", "base_model"),
    [
        ("org/teacher", "org/student", ["org/teacher", "org/student"]),
        ("LOCAL", "org/student", "org/student"),
        ("org/teacher", "LOCAL", "org/teacher"),
        ("org/model", "org/model", "org/model"),
        ("none", "org/model", "org/model"),
        ("none", "LOCAL", None),
    ],
)
def test_models_of_the_hub_that_the_run_starts_from_are_base_models(
    corpus: Corpus, tmp_path: Path, teacher: str, student: str, base_model: object
) -> None:
    names = [str(tmp_path) if name == "LOCAL" else name for name in (teacher, student)]
    card_of(corpus, names[0], OWN_TEXT, student=names[1]).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == base_model
    assert f"tarts from | model {tmp_path.name if student == 'LOCAL' else student} |" in card.text
    assert str(tmp_path) not in card.content


def test_a_single_hub_data_set_is_the_data_set_of_the_results(corpus: Corpus) -> None:
    for result in card_of(corpus, "google-bert/bert-base-uncased", WIKIPEDIA).data.eval_results:
        assert result.dataset_type == "wikimedia/wikipedia"


def test_a_file_name_does_not_break_the_table(corpus: Corpus) -> None:
    assert "| Data | a\\|b.txt |\n" in card_of(corpus, "org/teacher", SourceRecord("a|b.txt", 1)).text


def test_unknown_facts_and_local_models_and_data_are_omitted(corpus: Corpus, tiny_teacher_dir: Path) -> None:
    known = card_of(corpus, str(tiny_teacher_dir), OWN_TEXT).data.to_dict()
    assert set(known) == {"library_name", "model-index", "pipeline_tag", "tags"}


def test_a_model_without_a_teacher_has_no_base_model(corpus: Corpus) -> None:
    card = card_of(corpus, "none", OWN_TEXT)
    assert card.data.base_model is None
    assert card.data.tags == ["distilspeed"]
    assert "# Masked language model\n" in card.text


def test_the_text_states_teacher_data_and_results(saved: ModelCard) -> None:
    for line in (
        "# Distilled student\n",
        "| Teacher | google-bert/bert-base-uncased |",
        "| Student starts from | the teacher's layers 0, 3 |",
        "| Data | wikimedia/wikipedia:20231101.en, bookcorpus/bookcorpus, own.txt |",
        "| Masking | dynamic, 15 % of the tokens, drawn with probability ∝ count^-0.7 |",
        "| Final training loss | 8.0000 (soft 1.0000, MLM 2.0000, cosine 0.5000) |",
        "| Held-out rows | masked accuracy 61.2%, loss 2.1235 (1,234 tokens, drawn uniformly); with masks "
        "that prefer rare tokens, ∝ count^-0.7: accuracy 45.6%, MLM loss 2.9877 |",
    ):
        assert line in saved.text
