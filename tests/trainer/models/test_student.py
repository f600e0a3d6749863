"""A new student equals its teacher: same embedding output, same layers, same head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    PreTrainedModel,
)
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.families.layers import half_of_layers
from distilspeed.trainer.families.vocabulary import pad_vocabulary
from distilspeed.trainer.models.loading import (
    check_fits_corpus,
    load_language_model,
    load_teacher,
    make_student,
    model_from_config,
    select_teacher_layers,
    warn_without_tokenizer,
)
from distilspeed.trainer.training.export import whole_student

SHARED_TEACHER = Path(__file__).parents[4] / "shared" / "data" / "teacher-minilm"


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
def test_a_student_gives_the_same_as_its_layers_of_the_teacher(
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


# Checkpoints of a small untied model: the weights that are left out, ``tie_word_embeddings`` of the config, and whether
# the model that transformers loads is tied.
CHECKPOINTS = {
    "untied": ((), False, False),
    "untied, the config says tied": ((), True, False),
    "untied with one bias, the config says tied": (("decoder.bias",), True, False),
    "tied": (("decoder.weight", "decoder.bias"), True, True),
    "tied, saved under the decoder's names": (("word_embeddings.weight", "predictions.bias"), True, True),
}


def untied_checkpoint(folder: Path, left_out: tuple[str, ...] = (), config_says_tied: bool = False) -> Path:
    """Save a small BERT with different values in decoder and embeddings, and in its two biases."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(vocab_size=70, initializer_range=0.2, tie_word_embeddings=False, **sizes)
    )
    for bias in (model.cls.predictions.bias, model.cls.predictions.decoder.bias):
        torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.endswith(left_out or ("nothing",))}
    assert len(weights) - len(kept) == len(left_out)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": config_says_tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_student_is_tied_if_the_teachers_weights_are_regardless_of_its_config(
    tmp_path: Path, name: str
) -> None:
    left_out, config_says_tied, is_tied = CHECKPOINTS[name]
    teacher = load_teacher(str(untied_checkpoint(tmp_path / "teacher", left_out, config_says_tied)))
    plain = BertForMaskedLM.from_pretrained(tmp_path / "teacher").eval()
    ids = torch.arange(70)[None]
    expected = plain(ids).logits
    torch.testing.assert_close(teacher(ids).logits, expected)

    student = make_student(teacher, (0, 1)).eval()
    embeddings = student.distilbert.embeddings.word_embeddings
    assert (student.vocab_projector.weight is embeddings.weight) is is_tied
    torch.testing.assert_close(student(ids).logits, expected, rtol=1e-5, atol=1e-5)

    pad_vocabulary(student)  # as in training
    whole_student(student, dict(student.named_parameters())).save_pretrained(tmp_path / "student")
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "student")
    assert exported.config.tie_word_embeddings is is_tied
    torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "left_out", [("decoder.weight", "decoder.bias"), ("decoder.bias",), ("predictions.bias",)]
)
def test_tied_weights_under_a_config_that_says_untied_are_refused(
    tmp_path: Path, left_out: tuple[str, ...]
) -> None:
    with raises_user_error("damaged-model", "cls.predictions", '"tie_word_embeddings"'):
        load_teacher(str(untied_checkpoint(tmp_path, left_out, config_says_tied=False)))


def test_the_teacher_is_frozen_and_the_student_is_not(teacher: BertForMaskedLM) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training
    student = make_student(teacher, (0, 3))
    assert all(parameter.requires_grad for parameter in student.parameters())
    student.vocab_transform.weight.data.zero_()
    assert teacher.cls.predictions.transform.dense.weight.any(), "the student shares the teacher's memory"


def test_layers_are_spread_evenly_with_both_ends() -> None:
    assert half_of_layers(12) == (0, 2, 4, 7, 9, 11)
    assert half_of_layers(6) == (0, 3, 5)
    assert half_of_layers(4) == (0, 3)
    assert half_of_layers(24)[0] == 0
    assert half_of_layers(24)[-1] == 23
    assert len(half_of_layers(24)) == 12
    assert half_of_layers(1) == (0,)
    assert select_teacher_layers(BertConfig(), None) == half_of_layers(12)
    assert select_teacher_layers(BertConfig(), (1, 5)) == (1, 5)


@pytest.mark.parametrize("layers", [(), (0, 12), (-1, 3), (3, 3), (5, 2)])
def test_a_wrong_list_of_layers_is_refused(layers: tuple[int, ...]) -> None:
    with raises_user_error("bad-argument", "--student_layers"):
        select_teacher_layers(BertConfig(), layers)


def test_a_teacher_that_is_not_a_bert_with_an_mlm_head_is_refused(
    tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    with raises_user_error("unusable-model", str(tmp_path / "absent")):
        load_teacher(str(tmp_path / "absent"))
    AutoModel.from_pretrained(tiny_teacher_dir).save_pretrained(tmp_path / "headless")
    with raises_user_error("damaged-model", str(tmp_path / "headless"), "cls.predictions"):
        load_teacher(str(tmp_path / "headless"))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    AlbertForMaskedLM(AlbertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "albert")
    with raises_user_error("unsupported-model", '"albert"'):
        load_teacher(str(tmp_path / "albert"))
    BertForMaskedLM(BertConfig(vocab_size=50, layer_norm_eps=1e-5, **sizes)).save_pretrained(tmp_path / "eps")
    with raises_user_error("unsupported-model", "layer_norm_eps"):
        load_teacher(str(tmp_path / "eps"))


def test_a_teacher_that_does_not_fit_the_corpus_is_refused(
    teacher: BertForMaskedLM, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    corpus = open_corpus(small_corpus_dir)
    check_fits_corpus("teacher", str(tiny_teacher_dir), teacher, corpus)

    small = BertForMaskedLM(BertConfig(**(teacher.config.to_dict() | {"vocab_size": 500})))
    with raises_user_error("tokenizer-mismatch", "500"):
        check_fits_corpus("teacher", str(tiny_teacher_dir), small, corpus)
    short = BertForMaskedLM(BertConfig(**(teacher.config.to_dict() | {"max_position_embeddings": 32})))
    with raises_user_error("rows-too-long", "--seq_length 32"):
        check_fits_corpus("teacher", str(tiny_teacher_dir), short, corpus)


def copy_of(folder: Path, to: Path, *names: str) -> Path:
    to.mkdir()
    for name in names:
        shutil.copy(folder / name, to / name)
    return to


@pytest.fixture(scope="module")
def every_file(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Callable[[bool], Path]:
    """Write a folder with the tokenizer of the tiny teacher, or another one, in every kind of tokenizer file."""

    def write(is_the_corpus_tokenizer: bool) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(tiny_teacher_dir)
        pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
        if not is_the_corpus_tokenizer:
            pieces[-2:] = reversed(pieces[-2:])  # the same size
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
        BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        (folder / "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
        (folder / "added_tokens.json").write_text('{"[MASK]": 4}')
        (folder / "spiece.model").write_bytes(b"\n\x0c\n\x05piece")
        shutil.copy(tiny_teacher_dir / "config.json", folder)
        return folder

    return write


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
@pytest.mark.parametrize("is_the_corpus_tokenizer", [True, False])
def test_tokenizers_are_compared_by_any_file_with_a_vocabulary(
    teacher: BertForMaskedLM,
    small_corpus_dir: Path,
    every_file: Callable[[bool], Path],
    tmp_path: Path,
    name: str,
    is_the_corpus_tokenizer: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of(every_file(is_the_corpus_tokenizer), tmp_path / "model", name, "config.json")
    corpus = open_corpus(small_corpus_dir)
    if is_the_corpus_tokenizer:
        check_fits_corpus("student", str(folder), teacher, corpus)
    else:
        with raises_user_error("tokenizer-mismatch", f"student {folder}", "--tokenizer"):
            check_fits_corpus("student", str(folder), teacher, corpus)
    warn_without_tokenizer("student", str(folder))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model"]
)
def test_a_tokenizer_without_its_vocabulary_is_refused(
    teacher: BertForMaskedLM,
    small_corpus_dir: Path,
    every_file: Callable[[bool], Path],
    tmp_path: Path,
    name: str,
) -> None:
    folder = copy_of(every_file(True), tmp_path / "model", name, "config.json")
    with raises_user_error("unusable-tokenizer", str(folder)):
        check_fits_corpus("student", str(folder), teacher, open_corpus(small_corpus_dir))


def test_a_model_without_a_tokenizer_is_compared_by_vocabulary_size_with_a_warning(
    teacher: BertForMaskedLM,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copy_of(tiny_teacher_dir, tmp_path / "model", "config.json")
    check_fits_corpus("student", str(folder), teacher, open_corpus(small_corpus_dir))
    warn_without_tokenizer("student", str(folder))
    (warning,) = caplog.messages
    assert warning.startswith(f"the student {folder} has no tokenizer files")


def test_the_seed_determines_the_weights_of_a_model_from_a_config(
    tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    config = str(tiny_teacher_dir / "config.json")
    first, again, other = (model_from_config(config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    with raises_user_error("unusable-model", "student", str(tmp_path / "absent")):
        model_from_config(str(tmp_path / "absent"), 0)


@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("tied", [True, False])
def test_padding_the_vocabulary_changes_no_logits_and_is_removed_from_the_export(
    which: str, tied: bool
) -> None:
    config = BertConfig(
        vocab_size=70,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        tie_word_embeddings=tied,
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
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    assert model.config.vocab_size == 70

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert list(weights) == list(shapes)
    exported = whole_student(model, weights)
    assert {name: parameter.shape for name, parameter in exported.named_parameters()} == shapes
    torch.testing.assert_close(exported(ids).logits, expected)


@torch.no_grad()
def test_a_student_to_train_further_is_exported_untied_if_its_weights_are(tmp_path: Path) -> None:
    teacher = load_teacher(str(untied_checkpoint(tmp_path / "teacher")))
    make_student(teacher, (0, 1)).save_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "student" / "config.json").write_text(json.dumps(config))
    student = load_language_model("student", str(tmp_path / "student"))
    ids = torch.arange(70)[None]
    expected = student(ids).logits
    whole_student(student, dict(student.named_parameters())).save_pretrained(tmp_path / "exported")
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported").eval()
    torch.testing.assert_close(exported(ids).logits, expected)
