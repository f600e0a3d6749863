"""Every family keeps the promises of BERT: a student of its teacher, packed rows, padding, attention, FLOPs, export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, TINY_FAMILIES, shorten
from flash_attention import flash_attention_on_cpus
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, PreTrainedModel
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.families.masks import EAGER, FLEX, VARLEN
from distilspeed.trainer.families.registry import family_of
from distilspeed.trainer.families.vocabulary import pad_vocabulary
from distilspeed.trainer.models.attention import SDPA, choose_attention
from distilspeed.trainer.models.flops import model_shape
from distilspeed.trainer.models.inputs import tokenizer_for
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_teacher,
    make_student,
    select_teacher_layers,
)
from distilspeed.trainer.models.packed_forward import documents_of, forward_packed
from distilspeed.trainer.training.export import whole_student

ROWS = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tiny:
    """The tiny teacher of a family, its folder, and a micro-batch."""

    name: str
    folder: Path
    corpus: Corpus
    teacher: PreTrainedModel
    batch: MicroBatch

    @property
    def plain(self) -> PreTrainedModel:
        """The teacher as transformers loads it."""
        return family_of(self.teacher.config).model_class.from_pretrained(self.folder).eval()

    def logits(self, model: PreTrainedModel) -> torch.Tensor:
        with torch.no_grad():
            return forward_packed(model.eval(), self.batch).logits[..., : model.config.vocab_size]


@pytest.fixture(params=TINY_FAMILIES)
def tiny(request: pytest.FixtureRequest, family_dirs: Callable[[str], Any]) -> Tiny:
    folders = family_dirs(request.param)
    corpus = open_corpus(folders.corpus)
    batch = MicroBatches(corpus, BatchEquation(ROWS, ROWS, 1, 1), rank=0, seed=0)[0]
    return Tiny(request.param, folders.teacher, corpus, load_teacher(str(folders.teacher)), batch)


def test_a_student_with_all_layers_gives_the_teachers_logits(tiny: Tiny) -> None:
    student = make_student(tiny.teacher, range(LAYERS))
    torch.testing.assert_close(tiny.logits(student), tiny.logits(tiny.teacher), rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in student.parameters())
    ours, theirs = (
        {parameter.data_ptr() for parameter in model.parameters()} for model in (student, tiny.teacher)
    )
    assert not ours & theirs, "the student shares the teacher's memory"


def test_a_student_gives_the_same_as_its_layers_of_the_teacher(tiny: Tiny) -> None:
    layers = select_teacher_layers(tiny.teacher.config, None)
    assert len(layers) == LAYERS // 2
    student = make_student(tiny.teacher, layers)
    assert student.config.num_hidden_layers == len(layers)
    found = tiny.logits(student)
    shorten(tiny.teacher, tiny.name, layers)
    torch.testing.assert_close(found, tiny.logits(tiny.teacher), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_packed_documents_get_the_logits_that_transformers_gives_each_alone(tiny: Tiny, which: str) -> None:
    layers = select_teacher_layers(tiny.teacher.config, None)
    model, plain = (
        (tiny.teacher, tiny.plain) if which == "teacher" else 2 * (make_student(tiny.teacher, layers).eval(),)
    )
    packed = tiny.logits(model)
    assert packed.isfinite().all(), "padding gives NaN"
    documents = 0
    for ids, numbers, logits in zip(tiny.batch.input_ids, tiny.batch.document_ids, packed, strict=True):
        for number in range(int(numbers.max()) + 1):
            with torch.no_grad():
                alone = plain(ids[numbers == number][None]).logits[0]
            torch.testing.assert_close(logits[numbers == number], alone, rtol=1e-4, atol=1e-4)
            documents += 1
    assert documents > ROWS, "no row here packs several documents"


def test_padding_the_vocabulary_changes_no_logits_and_is_removed_from_the_export(
    tiny: Tiny, tmp_path: Path
) -> None:
    student = make_student(tiny.teacher, (0, 2))
    expected = tiny.logits(student)
    shapes = {name: parameter.shape for name, parameter in student.named_parameters()}
    pad_vocabulary(student)
    assert len(student.get_output_embeddings().weight) % 64 == 0
    torch.testing.assert_close(tiny.logits(student), expected)

    whole_student(student, dict(student.named_parameters())).save_pretrained(tmp_path)
    exported, loading = family_of(student.config).model_class.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values())
    assert {name: parameter.shape for name, parameter in exported.named_parameters()} == shapes
    torch.testing.assert_close(tiny.logits(exported), expected)


def test_the_exported_tokenizer_returns_the_models_inputs(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer_for(tiny.teacher, tiny.corpus.load_tokenizer()).save_pretrained(tmp_path)
    encoded = AutoTokenizer.from_pretrained(tmp_path)("the value", "of the list", return_tensors="pt")
    assert tiny.plain(**encoded).logits.isfinite().all()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("second", [SDPA, EAGER, pytest.param(FLEX, marks=pytest.mark.full)])
def test_its_attention_is_timed_and_every_implementation_gives_the_same(tiny: Tiny, second: str) -> None:
    if second == FLEX and not tiny.teacher._supports_flex_attn:
        pytest.skip("transformers does not run this architecture with flex attention")
    expected = tiny.logits(tiny.teacher)
    candidates = (SDPA, second)  # a single candidate is not timed
    choice = choose_attention(
        tiny.teacher, documents_of(tiny.batch), torch.float32, CPU, is_trained=False, candidates=candidates
    )
    assert set(choice.seconds) == set(candidates)
    tiny.teacher.set_attn_implementation(second)
    torch.testing.assert_close(tiny.logits(tiny.teacher), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_attention_by_documents_starts_gives_the_same(tiny: Tiny, which: str) -> None:
    """On the CPU the definition of flash attention stands in for its kernels."""
    model = tiny.teacher if which == "teacher" else make_student(tiny.teacher, (0, 2))
    model.eval().requires_grad_(True)

    def logits_and_gradients() -> list[torch.Tensor]:
        logits = forward_packed(model, tiny.batch).logits
        return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]

    expected = logits_and_gradients()
    candidates = (SDPA, VARLEN)
    with flash_attention_on_cpus() as calls:
        choice = choose_attention(
            model, documents_of(tiny.batch), torch.float32, CPU, is_trained=True, candidates=candidates
        )
        assert set(choice.seconds) == set(candidates)
        model.set_attn_implementation(VARLEN)
        calls.clear()
        torch.testing.assert_close(logits_and_gradients(), expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == model.config.num_hidden_layers


def test_forward_flops_equal_pytorchs_count(tiny: Tiny) -> None:
    tiny.teacher.set_attn_implementation(EAGER)  # the counter sees each product of eager attention
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny.teacher(torch.full((1, length), 7))
    found = model_shape(tiny.teacher.config).forward_flops_per_token(length) * length
    assert found == counter.get_total_flops()


def test_the_number_of_parameters_is_that_of_the_shape(tiny: Tiny) -> None:
    # Without biases and norms, which are a larger share here than in a real model.
    matrices = sum(weight.numel() for weight in tiny.teacher.parameters() if weight.dim() > 1)
    assert model_shape(tiny.teacher.config).parameters == pytest.approx(matrices, rel=0.01)


def test_it_limits_the_length_of_rows(tiny: Tiny) -> None:
    check_fits_corpus("teacher", str(tiny.folder), tiny.teacher, tiny.corpus)
    tiny.teacher.config.max_position_embeddings -= 1
    with raises_user_error("rows-too-long", "--seq_length 63"):
        check_fits_corpus("teacher", str(tiny.folder), tiny.teacher, tiny.corpus)
