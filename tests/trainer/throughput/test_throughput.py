"""The benchmark's baseline is the original recipe, and its check detects a slower trainer."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import Corpus, open_corpus, read_rows
from distilspeed.trainer.data.batches import corpus_masking_rule
from distilspeed.trainer.data.masking import IGNORE_INDEX
from distilspeed.trainer.data.micro_batch import (
    MicroBatch,
    document_layout,
    document_starts,
    labelled_places,
)
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import forward_packed
from distilspeed.trainer.objective.objective import Distillation, Objective
from distilspeed.trainer.objective.outputs import Models
from distilspeed.trainer.objective.registry import take_terms
from distilspeed.trainer.throughput.eager_recipe import BucketedPieces, EagerRecipe, PaddedBatch, mask_batch
from distilspeed.trainer.throughput.report import BenchmarkReport, check_against

STORED = Path(__file__).parents[3] / "launch" / "benchmarks"
ROWS = 40


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir: Path) -> BertForMaskedLM:
    return load_teacher(str(tiny_teacher_dir))


def test_an_epoch_has_every_piece_once_in_batches_of_similar_length(corpus: Corpus) -> None:
    stored = read_rows(corpus.train, range(ROWS))
    pieces = [
        tuple(piece.tolist())
        for row, lengths in zip(stored.input_ids, stored.document_lengths, strict=True)
        for piece in np.split(row[: lengths.sum()], np.cumsum(lengths)[:-1])
    ]
    found: list[tuple[int, ...]] = []
    batches = BucketedPieces(corpus, ROWS, tokens_per_batch=256, seed=0).batches()
    for batch in batches:
        lengths = batch.attention_mask.sum(1)
        assert lengths.max() - lengths.min() < 4
        assert batch.input_ids.shape[1] == lengths.max(), "padded beyond its longest"
        assert batch.attention_mask.sum() <= 256 + 64
        found += [tuple(ids[mask].tolist()) for ids, mask in zip(*batch, strict=True)]
        if len(found) >= len(pieces):
            break
    assert sorted(found) == sorted(pieces)


def test_masks_are_fifteen_percent_and_mostly_the_mask_token(corpus: Corpus) -> None:
    rule = corpus_masking_rule(corpus)
    weights = torch.from_numpy(rule.sampling_weights).float()
    torch.manual_seed(0)
    tokens = masked = as_mask = 0
    for batch in itertools.islice(BucketedPieces(corpus, ROWS, 512, seed=1).batches(), 30):
        ids, labels = mask_batch(batch, weights, rule)
        chosen = labels != IGNORE_INDEX
        assert not chosen[~batch.attention_mask].any()
        assert torch.equal(labels[chosen], batch.input_ids[chosen])
        assert torch.equal(ids[~chosen], batch.input_ids[~chosen])
        assert (weights[labels[chosen]] > 0).all(), "a special token was masked"
        tokens += int(batch.attention_mask.sum())
        masked += int(chosen.sum())
        as_mask += int((ids[chosen] == rule.mask_token_id).sum())
    assert masked / tokens == pytest.approx(0.15, abs=0.005)
    assert as_mask / masked == pytest.approx(0.8, abs=0.05)


def test_the_eager_loss_equals_the_trainers_loss(corpus: Corpus, teacher: BertForMaskedLM) -> None:
    """On rows with one document each and almost no padding, both define the same loss."""
    student = make_student(teacher, (0, 3)).eval()
    pieces = BucketedPieces(corpus, ROWS, tokens_per_batch=256, seed=0)
    recipe = EagerRecipe(student, teacher, pieces, accumulation_steps=1, device=torch.device("cpu"))
    batch: PaddedBatch = next(recipe.batches)
    torch.manual_seed(0)
    ids, labels = mask_batch(batch, recipe.weights, recipe.rule)
    eager = recipe.loss(ids, batch.attention_mask, labels)

    lengths = [np.array([int(mask.sum())]) for mask in batch.attention_mask]
    document_ids, position_ids = document_layout(lengths, ids.shape[1])
    packed = MicroBatch(
        ids,
        labels,
        torch.from_numpy(document_ids),
        torch.from_numpy(position_ids),
        torch.arange(len(ids)),
        batch.attention_mask.sum().float(),
        (labels != IGNORE_INDEX).sum().float(),
        torch.from_numpy(labelled_places(labels.numpy())),
        torch.from_numpy(document_starts(document_ids, most_documents=1)),
    )
    with torch.no_grad():
        targets = forward_packed(teacher, packed)
    objective = Objective(
        take_terms({}), Models(student.config, teacher.config, (0, 3), student.config.vocab_size)
    )
    ours = Distillation(student, objective, world_size=1, accumulation_steps=1)(packed, targets)
    torch.testing.assert_close(eager, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_eager_recipe_learns_in_half_precision(
    corpus: Corpus, teacher: BertForMaskedLM, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    student = make_student(teacher, (0, 3)).train()
    pieces = BucketedPieces(corpus, ROWS, tokens_per_batch=512, seed=0)
    recipe = EagerRecipe(student, teacher, pieces, 2, torch.device("cpu"), dtype)
    losses = [recipe.step()[1] for _ in range(40)]
    assert all(weight.dtype == torch.float32 for weight in student.parameters())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def report(ratio: float, **setting: object) -> BenchmarkReport:
    return BenchmarkReport(setting, {}, ratio, [ratio], {}, 1.0, {}, {}, {}, {}, {})


def test_the_check_fails_when_the_ratio_drops_by_more_than_a_tenth(tmp_path: Path) -> None:
    stored = tmp_path / "stored.json"
    stored.write_text(report(2.0, seq_length=128).to_json())
    check_against(stored, report(1.81, seq_length=128))
    with raises_user_error("slower-than-before", "1.79", "2.00", str(stored)):
        check_against(stored, report(1.79, seq_length=128))
    with raises_user_error("changed-benchmark", "seq_length"):
        check_against(stored, report(2.0, seq_length=512))
    stored.write_text("{}")
    with raises_user_error("unreadable-file", str(stored)):
        check_against(stored, report(2.0, seq_length=128))


@pytest.mark.parametrize("path", sorted(STORED.glob("*_training_*.json")), ids=lambda path: path.name)
def test_stored_benchmarks_can_be_read_for_the_check(path: Path) -> None:
    check_against(path, BenchmarkReport(**json.loads(path.read_text())))
