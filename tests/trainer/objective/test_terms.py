"""The terms: settings are checked, fused terms equal the separate ones, and an unused optional term costs nothing."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM
from user_errors import raises_user_error
from vocabularies import with_rows

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import forward_packed
from distilspeed.trainer.objective.fused import FusedTerms, fused_losses
from distilspeed.trainer.objective.masked_lm import MaskedLM
from distilspeed.trainer.objective.objective import Distillation, Objective
from distilspeed.trainer.objective.outputs import Models, Outputs
from distilspeed.trainer.objective.registry import check_terms, take_terms
from distilspeed.trainer.objective.soft_targets import SoftTargets
from distilspeed.trainer.objective.term import Logits, Needs, Shown, Term

LAYERS = (0, 3)


@dataclass(frozen=True)
class SquaredLogits(Term):
    """An optional term that reads logits: their mean square over real tokens."""

    name = "square"
    shown = Shown("square", "Squared logits", "squared logits", "#CC79A7")

    alpha_square: float = field(default=0.0, metadata={"help": "weight of the squared logits"})

    def needs(self, models: Models) -> Needs:
        return Needs(Logits.EVERYWHERE, student_layers=(1,), teacher_layers=(1, 2))

    def loss(self, outputs: Outputs, own: nn.Module) -> torch.Tensor:
        logits = outputs.student.logits[..., : outputs.vocab_size]
        return (logits**2).mean(-1)[outputs.is_real].sum() / outputs.batch.real_tokens

    def described(self) -> str:
        return "mean square of the logits"


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir: Path) -> BertForMaskedLM:
    return load_teacher(str(tiny_teacher_dir))


@pytest.fixture(scope="module")
def batch(small_corpus_dir: Path) -> MicroBatch:
    return MicroBatches(open_corpus(small_corpus_dir), BatchEquation(4, 4, 1, 1), 0, seed=0)[0]


def models_of(teacher: BertForMaskedLM) -> Models:
    return Models(make_student(teacher, LAYERS).config, teacher.config, LAYERS, teacher.config.vocab_size)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": 0.0}, {"temperature": float("nan")}, {"alpha_ce": -1.0}, {"alpha_cos": float("inf")}],
    ids=str,
)
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with raises_user_error("bad-argument", f"--{next(iter(wrong))}"):
        take_terms(wrong)


def test_at_least_one_loss_must_have_a_weight() -> None:
    check_terms(take_terms({"alpha_ce": 0.0, "alpha_cos": 0.0}), has_teacher=False)
    check_terms(take_terms({"alpha_mlm": 0.0, "alpha_cos": 0.0}), has_teacher=True)
    for settings, has_teacher in (
        ({"alpha_mlm": 0.0}, False),
        (dict.fromkeys(("alpha_ce", "alpha_mlm", "alpha_cos"), 0.0), True),
    ):
        with raises_user_error("bad-argument", "--alpha_ce", "--alpha_mlm", "--alpha_cos"):
            check_terms(take_terms(settings), has_teacher)


def test_terms_take_their_settings_and_leave_other_options() -> None:
    options = {"alpha_ce": 3.0, "seed": 1, "restrict_ce_to_mask": True}
    soft, *others = take_terms(options)
    assert soft == SoftTargets(alpha_ce=3.0, restrict_ce_to_mask=True)
    assert others == list(take_terms({})[1:])
    assert options == {"seed": 1}


def test_a_parser_is_made_from_the_terms_without_importing_torch() -> None:
    program = "import distilspeed.trainer.objective.registry, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unused_optional_term_does_not_change_the_identity(teacher: BertForMaskedLM) -> None:
    for terms in (take_terms({}), (*take_terms({}), SquaredLogits())):
        objective = Objective(terms, models_of(teacher))
        assert objective.identity() == {
            "alphas": [5.0, 2.0, 1.0],
            "temperature": 2.0,
            "restrict_ce_to_mask": False,
        }


@pytest.mark.parametrize("restrict", [False, True])
def test_the_fused_terms_equal_the_separate_ones(
    teacher: BertForMaskedLM, batch: MicroBatch, restrict: bool
) -> None:
    soft, hard = SoftTargets(alpha_ce=3.0, temperature=3.0, restrict_ce_to_mask=restrict), MaskedLM()
    student, models = make_student(teacher, LAYERS), models_of(teacher)
    places = Objective((soft, hard), models).places(batch)
    targets = forward_packed(teacher, batch, places)
    gradients, losses = [], []
    for is_fused in (True, False):
        outputs = Outputs(batch, forward_packed(student, batch, places), targets, places, models)
        if is_fused:
            loss, values = fused_losses(FusedTerms(soft, hard), outputs, loss_scale=1.0, inplace=True)
        else:
            values = {term.name: term.loss(outputs, nn.Identity()) for term in (soft, hard)}
            loss = 3 * values["ce"] + 2 * values["mlm"]
        gradients.append(torch.autograd.grad(loss, student.vocab_transform.weight)[0])
        losses.append(torch.stack([loss, values["ce"], values["mlm"]]).detach())
    torch.testing.assert_close(*losses)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("rows", [(1000, 1024), (1030, 1000), (1003, 1100)])
def test_rows_beyond_the_tokenizer_do_not_change_the_losses(
    teacher: BertForMaskedLM, batch: MicroBatch, is_fused: bool, rows: tuple[int, int]
) -> None:
    soft, hard = SoftTargets(), MaskedLM()
    student = make_student(teacher, LAYERS)
    wider = [with_rows(model, count) for model, count in zip((student, teacher), rows, strict=True)]
    found, gradients = [], []
    for ours, theirs in ((student, teacher), wider):
        models = Models(ours.config, theirs.config, LAYERS, teacher.config.vocab_size)
        outputs = Outputs(batch, forward_packed(ours, batch), forward_packed(theirs, batch), None, models)
        if is_fused:
            loss, values = fused_losses(FusedTerms(soft, hard), outputs, loss_scale=1.0, inplace=True)
        else:
            values = {term.name: term.loss(outputs, nn.Identity()) for term in (soft, hard)}
            loss = 5 * values["ce"] + 2 * values["mlm"]
        found.append(torch.stack([loss, values["ce"], values["mlm"]]).detach())
        gradients.append(torch.autograd.grad(loss, ours.distilbert.embeddings.word_embeddings.weight)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    assert (gradients[1][rows[0] :] == 0).all()
    assert (gradients[1][:1000] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_a_term_that_reads_logits_works_beside_the_fused_terms(
    teacher: BertForMaskedLM, batch: MicroBatch
) -> None:
    found, gradients, weight = [], [], 0.5
    for terms in (take_terms({}), (*take_terms({}), SquaredLogits(weight))):
        student = make_student(teacher, LAYERS)
        objective = Objective(terms, models_of(teacher))
        module = Distillation(student, objective, world_size=1, accumulation_steps=1)
        targets = forward_packed(teacher, batch, objective.places(batch), objective.needs.teacher_layers)
        module(batch, targets).backward()
        found.append(module.last_parts)
        gradients.append(student.vocab_transform.weight.grad)
    student = make_student(teacher, LAYERS)
    outputs = Outputs(batch, forward_packed(student, batch), None, None, models_of(teacher))
    square = SquaredLogits(weight).loss(outputs, nn.Identity())
    square.backward()
    torch.testing.assert_close(found[1][-1], square.detach())
    torch.testing.assert_close(found[1][0], found[0][0] + weight * square.detach())
    torch.testing.assert_close(gradients[1], gradients[0] + weight * student.vocab_transform.weight.grad)


def test_a_term_that_cannot_be_computed_takes_no_part_unless_it_was_chosen(teacher: BertForMaskedLM) -> None:
    models = models_of(teacher)
    models.student.dim = 16
    objective = Objective(take_terms({}), models)
    objective.check()
    assert [term.name for term in objective.terms] == ["ce", "mlm"]
    assert objective.identity()["alphas"] == [5.0, 2.0]
    for given, weight in ((["alpha_cos"], 1.0), ([], 2.0)):
        with raises_user_error("conflicting-arguments", f"--alpha_cos {weight:g}", "16", "32"):
            Objective(take_terms({"alpha_cos": weight}), models).check(given)
    Objective(take_terms({"alpha_cos": 0.0}), models).check(["alpha_cos"])
    with raises_user_error("bad-argument", "--alpha_ce", "--alpha_mlm"):
        Objective(take_terms({"alpha_ce": 0.0, "alpha_mlm": 0.0}), models).check()
    Objective(take_terms({"alpha_cos": 2.0}), models._replace(teacher=None)).check(["alpha_cos"])


def test_an_optional_term_without_a_weight_needs_nothing(teacher: BertForMaskedLM) -> None:
    terms = take_terms({"restrict_ce_to_mask": True})
    without, with_it = (
        Objective((*terms, SquaredLogits(weight)), models_of(teacher)) for weight in (0.0, 1.0)
    )
    assert without.needs == Objective(terms, models_of(teacher)).needs == Needs(Logits.LABELLED)
    assert without.terms == terms
    assert with_it.needs == Needs(Logits.EVERYWHERE, student_layers=(1,), teacher_layers=(1, 2))


def test_a_term_of_weight_0_is_logged_but_not_trained(teacher: BertForMaskedLM, batch: MicroBatch) -> None:
    objective = Objective(take_terms({"alpha_cos": 0.0}), models_of(teacher))
    module = Distillation(make_student(teacher, LAYERS), objective, 1, 1)
    module(batch, forward_packed(teacher, batch))
    assert module.last_parts[3] > 0
    assert [term.name for term in objective.trained] == ["ce", "mlm"]


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_requested_layers_have_the_numbers_of_transformers(
    teacher: BertForMaskedLM, batch: MicroBatch, which: str
) -> None:
    model = (teacher if which == "teacher" else make_student(teacher, LAYERS)).eval()
    length = batch.input_ids.shape[1]
    whole = batch._replace(  # as if each row were one document
        document_ids=torch.zeros_like(batch.document_ids),
        position_ids=torch.arange(length).expand_as(batch.position_ids),
    )
    expected = model(whole.input_ids, output_hidden_states=True).hidden_states
    outputs = forward_packed(model, whole, layers=(0, 2))
    assert list(outputs.layers) == [0, 2]
    for layer, states in outputs.layers.items():
        torch.testing.assert_close(states, expected[layer])
    assert forward_packed(model, whole).layers == {}
