"""Causal language modelling: the loss of transformers on each document, fused or not; flags of the other objective."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.models.loading import load_teacher, make_student
from distilspeed.trainer.models.packed_forward import forward_packed
from distilspeed.trainer.objective.causal_lm import CausalLM
from distilspeed.trainer.objective.fused import fused_terms
from distilspeed.trainer.objective.objective import Distillation, Objective
from distilspeed.trainer.objective.outputs import Models, Outputs
from distilspeed.trainer.objective.registry import TERMS, check_terms, take_terms, terms_for

LAYERS = (0, 3)


@pytest.fixture(scope="module")
def teacher(family_dirs: Callable[[str], Any]) -> PreTrainedModel:
    return load_teacher(str(family_dirs("gpt2").teacher))


@pytest.fixture(scope="module")
def batch(family_dirs: Callable[[str], Any]) -> MicroBatch:
    return MicroBatches(open_corpus(family_dirs("gpt2").corpus), BatchEquation(4, 4, 1, 1), 0, seed=0)[0]


def loss_of_transformers(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The mean over next tokens, from transformers' own loss of each document alone."""
    total, count = torch.zeros(()), 0
    for ids, numbers in zip(batch.input_ids, batch.document_ids, strict=True):
        for number in range(int(numbers.max()) + 1):
            document = ids[numbers == number][None]
            total = total + model(document, labels=document).loss * (document.numel() - 1)
            count += document.numel() - 1
    return total / count


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_loss_and_its_gradient_are_those_of_transformers_on_each_document(
    teacher: PreTrainedModel, batch: MicroBatch, has_teacher: bool
) -> None:
    expected, found = make_student(teacher, LAYERS), make_student(teacher, LAYERS)
    of_transformers = loss_of_transformers(expected, batch)
    (0.5 * of_transformers).backward()

    models = Models(found.config, teacher.config if has_teacher else None, LAYERS, found.config.vocab_size)
    terms = take_terms({"alpha_ce": 0.0, "alpha_cos": 0.0}, "causal")
    module = Distillation(found, Objective(terms, models), world_size=1, accumulation_steps=1)
    assert (module.fused is not None) == has_teacher
    module(batch, forward_packed(teacher, batch) if has_teacher else None).backward()
    names = [term.name for term in module.objective.terms]
    assert names == ["ce", "clm", "cos"]
    torch.testing.assert_close(module.last_parts[1 + names.index("clm")], of_transformers.detach())
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_the_fused_terms_equal_the_separate_ones(teacher: PreTrainedModel, batch: MicroBatch) -> None:
    terms = take_terms({}, "causal")
    student = make_student(teacher, LAYERS)
    models = Models(student.config, teacher.config, LAYERS, student.config.vocab_size)
    fused = Distillation(student, Objective(terms, models), 1, 1)
    targets = forward_packed(teacher, batch)
    outputs = Outputs(batch, forward_packed(student, batch), targets, None, models)
    expected = sum(term.weight * term.loss(outputs, nn.Identity()) for term in terms)
    assert fused_terms(terms) is not None
    torch.testing.assert_close(fused(batch, targets), expected)


def test_terms_of_the_other_objective_take_no_part() -> None:
    everything = [kind() for kind in TERMS]
    for objective, names in (("masked", ["ce", "mlm", "cos"]), ("causal", ["ce", "clm", "cos"])):
        applicable = terms_for(everything, objective, given=())
        assert [term.name for term in applicable] == names
        assert applicable == take_terms({}, objective)


@pytest.mark.parametrize(("objective", "flag"), [("causal", "alpha_mlm"), ("masked", "alpha_clm")])
def test_a_flag_of_the_other_objective_is_refused_even_with_its_default(objective: Any, flag: str) -> None:
    with raises_user_error("conflicting-arguments", f"--{flag}", objective):
        terms_for([kind() for kind in TERMS], objective, given={flag})


def test_soft_targets_on_masked_tokens_are_refused_for_a_causal_model() -> None:
    with raises_user_error("conflicting-arguments", "--restrict_ce_to_mask", "causal"):
        terms_for(take_terms({"restrict_ce_to_mask": True}, "causal"), "causal", given=())


def test_the_weight_of_masked_language_modelling_is_none_for_a_causal_model() -> None:
    settings = dict.fromkeys(("alpha_ce", "alpha_clm", "alpha_cos"), 0.0)
    with raises_user_error("bad-argument", "--alpha_ce, --alpha_clm, --alpha_cos"):
        check_terms(take_terms(settings, "causal"), has_teacher=True)
    check_terms(take_terms({"alpha_ce": 0.0, "alpha_cos": 0.0}, "causal"), has_teacher=False)
    assert CausalLM().weight == 0.5  # as in the original code
