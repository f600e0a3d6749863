"""The student starts as its teacher: same embedding output, same layers, same head."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from distilspeed.trainer.corpus import open_corpus
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.export import whole_student
from distilspeed.trainer.families import pad_vocabulary
from distilspeed.trainer.student import (
    check_fits_corpus,
    load_teacher,
    make_student,
    model_from_config,
    select_teacher_layers,
)

SHARED_TEACHER = Path(__file__).parents[3] / "shared" / "data" / "teacher-minilm"


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir: Path) -> BertForMaskedLM:
    return load_teacher(str(tiny_teacher_dir))


@pytest.fixture(scope="module")
def input_ids() -> torch.Tensor:
    return torch.randint(5, 900, (3, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_student_with_all_layers_gives_the_teachers_logits(
    teacher: BertForMaskedLM, input_ids: torch.Tensor
) -> None:
    student = make_student(teacher, range(4)).eval()
    mask = torch.ones_like(input_ids)
    mask[1, 30:] = 0
    expected, found = (model(input_ids, attention_mask=mask).logits for model in (teacher, student))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif(not SHARED_TEACHER.exists(), reason="no shared/data/teacher-minilm beside the project")
def test_a_student_with_all_layers_gives_a_real_teachers_logits() -> None:
    teacher = load_teacher(str(SHARED_TEACHER))
    student = make_student(teacher, range(6)).eval()
    tokens = AutoTokenizer.from_pretrained(SHARED_TEACHER)(
        "Paris is the [MASK] of France.", return_tensors="pt"
    )
    tokens.pop("token_type_ids", None)
    torch.testing.assert_close(student(**tokens).logits, teacher(**tokens).logits, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_any_list_of_layers_gives_what_those_layers_of_the_teacher_give(
    teacher: BertForMaskedLM, input_ids: torch.Tensor, tiny_teacher_dir: Path
) -> None:
    student = make_student(teacher, (1, 3)).eval()
    shortened = load_teacher(str(tiny_teacher_dir))
    shortened.bert.encoder.layer = torch.nn.ModuleList(teacher.bert.encoder.layer[i] for i in (1, 3))
    torch.testing.assert_close(student(input_ids).logits, shortened(input_ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_token_type_row_is_folded_into_the_positions(
    teacher: BertForMaskedLM, input_ids: torch.Tensor
) -> None:
    student = make_student(teacher, (0,)).eval()
    torch.testing.assert_close(
        student.distilbert.embeddings(input_ids), teacher.bert.embeddings(input_ids), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_where_the_teachers_are(
    teacher: BertForMaskedLM, tmp_path: Path, tied: bool
) -> None:
    source = BertForMaskedLM(BertConfig(**(teacher.config.to_dict() | {"tie_word_embeddings": tied})))
    student = make_student(source, (0, 3))
    shared = student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight
    assert shared is tied
    torch.testing.assert_close(student.vocab_projector.weight, source.cls.predictions.decoder.weight)


def test_the_teacher_is_frozen_and_the_student_is_not(teacher: BertForMaskedLM) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    student = make_student(teacher, (0, 3))
    assert all(parameter.requires_grad for parameter in student.parameters())
    student.vocab_transform.weight.data.zero_()
    assert teacher.cls.predictions.transform.dense.weight.any(), "the student shares the teacher's memory"


def test_layers_are_spread_evenly_with_both_ends() -> None:
    assert select_teacher_layers(12, None) == (0, 2, 4, 7, 9, 11)
    assert select_teacher_layers(6, None) == (0, 3, 5)
    assert select_teacher_layers(4, None) == (0, 3)
    assert select_teacher_layers(24, None)[0] == 0
    assert select_teacher_layers(24, None)[-1] == 23
    assert len(select_teacher_layers(24, None)) == 12
    assert select_teacher_layers(1, None) == (0,)
    assert select_teacher_layers(12, (1, 5)) == (1, 5)


@pytest.mark.parametrize("layers", [(), (0, 12), (-1, 3), (3, 3), (5, 2)])
def test_a_wrong_list_of_layers_is_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="student_layers"):
        select_teacher_layers(12, layers)


def test_what_is_no_bert_with_an_mlm_head_is_refused(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load"):
        load_teacher(str(tmp_path / "absent"))
    AutoModel.from_pretrained(tiny_teacher_dir).save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="head"):
        load_teacher(str(tmp_path / "headless"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    RobertaForMaskedLM(RobertaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(UserError, match='"roberta"'):
        load_teacher(str(tmp_path / "roberta"))
    BertForMaskedLM(BertConfig(vocab_size=50, layer_norm_eps=1e-5, **sizes)).save_pretrained(tmp_path / "eps")
    with pytest.raises(UserError, match="layer_norm_eps"):
        load_teacher(str(tmp_path / "eps"))


def test_a_teacher_that_does_not_go_with_the_corpus_is_refused(
    teacher: BertForMaskedLM, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    corpus = open_corpus(small_corpus_dir)
    check_fits_corpus("teacher", str(tiny_teacher_dir), teacher, corpus)

    lowercase = AutoTokenizer.from_pretrained(tiny_teacher_dir)
    lowercase.add_tokens(["distilspeed"])
    lowercase.save_pretrained(tmp_path / "other")
    teacher.config.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        check_fits_corpus("teacher", str(tmp_path / "other"), teacher, corpus)

    small = BertForMaskedLM(BertConfig(**(teacher.config.to_dict() | {"vocab_size": 500})))
    with pytest.raises(UserError, match="500"):
        check_fits_corpus("teacher", str(tiny_teacher_dir), small, corpus)
    short = BertForMaskedLM(BertConfig(**(teacher.config.to_dict() | {"max_position_embeddings": 32})))
    with pytest.raises(UserError, match="32 positions"):
        check_fits_corpus("teacher", str(tiny_teacher_dir), short, corpus)


def test_a_model_from_a_config_has_the_seeds_weights(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    config = str(tiny_teacher_dir / "config.json")
    first, again, other = (model_from_config(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(UserError, match="student's config"):
        model_from_config(str(tmp_path / "absent"), 0)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_padding_the_vocabulary_changes_no_logit_and_is_left_out_of_the_export(which: str) -> None:
    config = BertConfig(
        vocab_size=70, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model: PreTrainedModel = BertForMaskedLM(config).eval()
    if which == "student":
        model = make_student(model, (0, 1)).eval()
    ids = torch.arange(70)[None]
    expected = model(ids).logits
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    pad_vocabulary(model)
    padded = model(ids).logits
    assert padded.shape[-1] == 128
    torch.testing.assert_close(padded[..., :70], expected)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.vocab_size == 70

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert list(weights) == list(shapes)
    exported = whole_student(model, weights)
    assert {name: parameter.shape for name, parameter in exported.named_parameters()} == shapes
    torch.testing.assert_close(exported(ids).logits, expected)
