"""The objective: documents of a packed row are independent, losses match their definitions, means are global."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertForMaskedLM, PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, open_corpus, read_rows
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.micro_batch import MicroBatch, document_layout, document_starts
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import forward_packed
from distilspeed.trainer.objective.objective import Distillation, Objective
from distilspeed.trainer.objective.outputs import Models
from distilspeed.trainer.objective.registry import take_terms

ROWS = 12
LAYERS = (0, 3)


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir: Path) -> BertForMaskedLM:
    return load_teacher(str(tiny_teacher_dir))


@pytest.fixture(scope="module")
def corpus(small_corpus_dir: Path) -> Corpus:
    return open_corpus(small_corpus_dir)


def micro_batches(corpus: Corpus, micro: int, world: int) -> list[MicroBatch]:
    """Return the micro-batches of global batch 0 of all ranks."""
    equation = BatchEquation(ROWS, micro, ROWS // (micro * world), world)
    return [
        batch
        for rank in range(world)
        for batch in MicroBatches(corpus, equation, rank, seed=0).loader(0, 1, num_workers=0)
    ]


def packed(corpus: Corpus, rows: list[int]) -> tuple[MicroBatch, list[np.ndarray]]:
    """Return rows as stored, unmasked, and the lengths of their documents."""
    stored = read_rows(corpus.train, rows)
    document_ids, position_ids = document_layout(stored.document_lengths, corpus.manifest.seq_length)
    ids = torch.from_numpy(stored.input_ids)
    one = torch.ones(())
    batch = MicroBatch(
        ids,
        ids,
        torch.from_numpy(document_ids),
        torch.from_numpy(position_ids),
        torch.tensor(rows),
        one,
        one,
        torch.tensor([0]),
        torch.from_numpy(document_starts(document_ids, most_documents=document_ids.max() + 1)),
    )
    return batch, stored.document_lengths


@torch.no_grad()
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_packed_row_gives_the_same_hidden_states_as_its_documents_alone(
    teacher: BertForMaskedLM, corpus: Corpus, which: str
) -> None:
    model = (teacher if which == "teacher" else make_student(teacher, (0, 2, 3)).eval()).double()
    batch, lengths = packed(corpus, list(range(20)))
    assert max(len(of_row) for of_row in lengths) > 2, "no row here packs several documents"
    outputs = forward_packed(model, batch)
    assert torch.isfinite(outputs.logits).all(), "padding gives NaN"
    for row, of_row in enumerate(lengths):
        for start, length in zip(np.cumsum(of_row) - of_row, of_row, strict=True):
            place = slice(start, start + length)
            alone = model(batch.input_ids[row : row + 1, place], output_hidden_states=True)
            torch.testing.assert_close(outputs.hidden_states[row, place], alone.hidden_states[-1][0])
            torch.testing.assert_close(outputs.logits[row, place], alone.logits[0])
    teacher.float()


def objective_of(student: PreTrainedModel, teacher: BertForMaskedLM | None, **settings: Any) -> Objective:
    models = Models(student.config, teacher.config if teacher else None, LAYERS, student.config.vocab_size)
    return Objective(take_terms(settings), models)


def losses_by_definition(
    student: torch.nn.Module, teacher: BertForMaskedLM, batch: MicroBatch, restrict: bool
) -> torch.Tensor:
    """Return the weighted sum and the losses of a global batch, computed on selected tokens with torch's functions."""
    ours, theirs = forward_packed(student, batch), forward_packed(teacher, batch)
    real, masked = batch.document_ids >= 0, batch.labels >= 0
    where = masked if restrict else real
    soft = functional.kl_div(
        functional.log_softmax(ours.logits[where] / 2, -1),
        functional.softmax(theirs.logits[where] / 2, -1),
        reduction="batchmean",
    )
    hard = functional.cross_entropy(ours.logits[masked], batch.labels[masked])
    ones = torch.ones(int(real.sum()))
    cosine = functional.cosine_embedding_loss(ours.hidden_states[real], theirs.hidden_states[real], ones)
    return torch.stack([5 * 4 * soft + 2 * hard + cosine, 4 * soft, hard, cosine])


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize(("micro", "world"), [(12, 1), (3, 1), (2, 3)])
def test_loss_and_gradient_match_the_definitions_over_the_global_batch(
    teacher: BertForMaskedLM, corpus: Corpus, micro: int, world: int, restrict: bool
) -> None:
    (whole,) = micro_batches(corpus, ROWS, 1)
    reference = make_student(teacher, LAYERS)
    expected = losses_by_definition(reference, teacher, whole, restrict)
    expected[0].backward()

    shares = ROWS // micro
    student = make_student(teacher, LAYERS)
    objective = objective_of(student, teacher, restrict_ce_to_mask=restrict)
    module = Distillation(student, objective, world, accumulation_steps=shares // world)
    parts = torch.zeros(4)
    for batch in micro_batches(corpus, micro, world):
        with torch.no_grad():
            targets = forward_packed(teacher, batch, objective.places(batch))
        (module(batch, targets) / shares).backward()  # DeepSpeed's average over ranks and accumulation steps
        parts += module.last_parts

    torch.testing.assert_close(parts, expected.detach(), rtol=1e-5, atol=1e-6)
    found, wanted = (flat_gradient(model) for model in (module.student, reference))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_the_module_returns_one_scalar(teacher: BertForMaskedLM, corpus: Corpus) -> None:
    # DeepSpeed 0.18.3 to 0.18.9 scales gradients wrongly if there is more than one output tensor.
    (batch,) = micro_batches(corpus, ROWS, 1)
    student = make_student(teacher, LAYERS)
    module = Distillation(student, objective_of(student, teacher), world_size=1, accumulation_steps=1)
    loss = module(batch, forward_packed(teacher, batch))
    assert isinstance(loss, torch.Tensor)
    assert loss.shape == ()
    assert loss.dtype == torch.float32


def test_without_a_teacher_the_loss_is_masked_language_modelling(
    teacher: BertForMaskedLM, corpus: Corpus
) -> None:
    (batch,) = micro_batches(corpus, ROWS, 1)
    student = make_student(teacher, LAYERS)
    module = Distillation(student, objective_of(student, None), world_size=1, accumulation_steps=1)
    masked = batch.labels >= 0
    logits = forward_packed(student, batch).logits
    expected = 2 * functional.cross_entropy(logits[masked], batch.labels[masked])
    torch.testing.assert_close(module(batch, None), expected)
    torch.testing.assert_close(module.last_parts, expected.detach() * torch.tensor([1, 0, 0.5, 0]))
