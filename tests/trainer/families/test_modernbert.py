"""ModernBERT: layers that keep the order of global and sliding attention, windows, rotary positions, settings."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import LAYERS, WINDOW
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, ModernBertConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_sliding_window_mask
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.data.micro_batch import MicroBatch
from distilspeed.trainer.engine.teacher import ReplicatedTeacher
from distilspeed.trainer.families import modernbert
from distilspeed.trainer.families.layers import half_in_order_of_types
from distilspeed.trainer.families.masks import Documents
from distilspeed.trainer.families.modernbert import GLOBAL, SLIDING, ModernBertFamily
from distilspeed.trainer.families.vocabulary import is_tied, pad_vocabulary
from distilspeed.trainer.models.attention import SDPA
from distilspeed.trainer.models.loading import load_teacher, make_student, select_teacher_layers
from distilspeed.trainer.models.packed_forward import documents_of, encode_packed, forward_packed

FAMILY = ModernBertFamily()


@pytest.fixture
def teacher_dir(family_dirs: Callable[[str], Any]) -> Path:
    return family_dirs("modernbert").teacher


@pytest.fixture
def batch(family_dirs: Callable[[str], Any]) -> MicroBatch:
    batch = MicroBatches(open_corpus(family_dirs("modernbert").corpus), BatchEquation(8, 8, 1, 1), 0, seed=0)[
        0
    ]
    assert batch.position_ids.max() > WINDOW, "no document is longer than the window"
    return batch


def logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    with torch.no_grad():
        return forward_packed(model.eval(), batch).logits[..., : model.config.vocab_size]


def one_document(row: torch.Tensor) -> Documents:
    """Return the documents of a row that is one document, [1, length]."""
    return Documents(
        torch.zeros_like(row, dtype=torch.long), torch.tensor([0, row.shape[1]], dtype=torch.int32)
    )


def edited(teacher_dir: Path, folder: Path, **settings: object) -> Path:
    """Save a teacher's config.json with other settings."""
    config = json.loads((teacher_dir / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(teacher_dir: Path, folder: Path, **settings: object) -> Path:
    """Save a teacher with other settings and random weights, biases included."""
    model = AutoModelForMaskedLM.from_config(
        ModernBertConfig.from_pretrained(edited(teacher_dir, folder, **settings))
    )
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


def of_every_third(layers: int) -> list[str]:
    return ModernBertConfig(num_hidden_layers=layers).layer_types


def test_half_of_the_layers_in_the_published_sizes() -> None:
    assert half_in_order_of_types(of_every_third(22)) == (0, 2, 4, 6, 8, 10, 12, 14, 17, 18, 20)
    assert half_in_order_of_types(of_every_third(28)) == (0, 2, 4, 6, 8, 10, 12, 14, 17, 18, 20, 23, 24, 26)


def test_every_third_layer_of_the_student_is_global_like_the_teachers() -> None:
    for layers in range(1, 40):
        types = of_every_third(layers)
        chosen = half_in_order_of_types(types)
        assert [types[layer] for layer in chosen] == of_every_third(max(1, layers // 2))


@given(types=st.lists(st.sampled_from([GLOBAL, SLIDING]), min_size=1, max_size=9))
def test_no_layers_of_these_types_are_spread_more_evenly(types: list[str]) -> None:
    kept = max(1, len(types) // 2)

    def unevenness(layers: Sequence[int]) -> float:
        step = (len(types) - 1) / max(1, kept - 1)
        return sum((layer - place * step) ** 2 for place, layer in enumerate(layers))

    choices = [
        layers
        for layers in itertools.combinations(range(len(types)), kept)
        if layers[0] == 0 and [types[layer] for layer in layers] == types[:kept]
    ]
    chosen = half_in_order_of_types(types)
    assert chosen in choices
    assert unevenness(chosen) == pytest.approx(min(map(unevenness, choices)))


@pytest.mark.parametrize("chosen", [None, (0, 1), (0, 1, 3), (0, 3)])
def test_the_exported_student_has_the_types_of_its_layers(
    teacher_dir: Path, batch: MicroBatch, tmp_path: Path, chosen: tuple[int, ...] | None
) -> None:
    teacher = load_teacher(str(teacher_dir))
    layers = select_teacher_layers(teacher.config, chosen)
    student = make_student(teacher, layers)
    student.save_pretrained(tmp_path)
    types = [teacher.config.layer_types[layer] for layer in layers]
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == types
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert [layer.attention_type for layer in exported.model.layers] == types
    assert torch.equal(logits(exported, batch), logits(student, batch))


def test_a_reader_that_knows_only_the_default_order_gets_the_default_students_types(
    teacher_dir: Path, tmp_path: Path
) -> None:
    teacher = load_teacher(str(teacher_dir))
    student = make_student(teacher, select_teacher_layers(teacher.config, None))
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModernBertConfig.from_pretrained(tmp_path).layer_types == student.config.layer_types


def test_a_student_must_start_with_layer_0(teacher_dir: Path) -> None:
    teacher = load_teacher(str(teacher_dir))
    assert isinstance(teacher.model.layers[0].attn_norm, torch.nn.Identity)
    with raises_user_error("bad-argument", "--student_layers 1,3", "0"):
        make_student(teacher, (1, 3))


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"layer_types": [GLOBAL] * (LAYERS - 1)}, "unusable-model", "layer_types"),
        ({"layer_types": [GLOBAL] * (LAYERS - 1) + ["local"]}, "unusable-model", "layer_types"),
        (
            {"layer_types": [GLOBAL] * (LAYERS - 1) + ["chunked_attention"]},
            "unsupported-model",
            "layer_types",
        ),
        (
            {"rope_parameters": {GLOBAL: {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}},
            "unsupported-model",
            "rope_type",
        ),
    ],
)
def test_a_config_that_fits_no_packed_rows_is_refused(
    teacher_dir: Path, tmp_path: Path, settings: dict[str, Any], code: Any, named: str
) -> None:
    with raises_user_error(code, str(tmp_path), named):
        load_teacher(str(edited(teacher_dir, tmp_path, **settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_dropout": 0.1, "mlp_dropout": 0.2, "embedding_dropout": 0.3},
        {"classifier_bias": True, "decoder_bias": False},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": False},
        {"sparse_prediction": True},
        {
            "local_attention": 9,
            "rope_parameters": {SLIDING: {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}},
        },
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_student_inherits_every_setting(
    teacher_dir: Path, batch: MicroBatch, tmp_path: Path, settings: dict[str, Any]
) -> None:
    teacher = load_teacher(str(changed(teacher_dir, tmp_path, **settings)))
    student = make_student(teacher, range(LAYERS))
    ours, theirs = student.config.to_dict(), teacher.config.to_dict()
    assert {name for name in theirs if ours[name] != theirs[name]} <= {"dtype"}
    assert is_tied(student) == settings.get("tie_word_embeddings", True)
    expected = logits(teacher, batch)
    assert torch.equal(logits(student, batch), expected)
    pad_vocabulary(student)
    torch.testing.assert_close(logits(student, batch), expected)
    # Without labels, as plain transformers gives them.
    ids = batch.input_ids[:1, :20]
    with torch.no_grad():
        plain = AutoModelForMaskedLM.from_pretrained(tmp_path)(ids).logits
        masks = FAMILY.attention_mask(teacher.config, one_document(ids), SDPA)
        states = teacher.model(input_ids=ids, attention_mask=masks).last_hidden_state
        torch.testing.assert_close(FAMILY.head(teacher, states), plain)


@pytest.mark.parametrize("local_attention", [2, 9, 16, 200])
def test_the_window_is_that_of_transformers(local_attention: int) -> None:
    config = ModernBertConfig(num_hidden_layers=2, local_attention=local_attention)
    config._attn_implementation = SDPA
    expected = create_bidirectional_sliding_window_mask(
        config, torch.zeros(1, 40, 8), attention_mask=None, allow_is_bidirectional_skip=False
    )
    found = FAMILY.attention_mask(config, one_document(torch.zeros(1, 40)), SDPA)
    assert torch.equal(found[SLIDING], expected)
    assert found[GLOBAL].all()


def test_the_timed_attention_is_that_of_the_type_of_most_layers_with_its_mask(
    teacher_dir: Path, batch: MicroBatch
) -> None:
    for layers, first in (((0, 1, 2, 3), 0), ((0, 1, 2), 1), ((0, 3), 0)):
        student = make_student(load_teacher(str(teacher_dir)), layers).eval()
        calls: list[tuple[Any, ...]] = []
        attention = student.model.layers[first].attn
        handle = attention.register_forward_hook(
            lambda module, inputs, output, calls=calls: calls.append((inputs[0], output[0]))
        )
        with torch.no_grad():
            encode_packed(student, batch)
            ((states, expected),) = calls
            handle.remove()
            masks = FAMILY.attention_mask(student.config, documents_of(batch), SDPA)
            found = FAMILY.first_attention(student)(states, attention_mask=masks)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_masks_are_made_once_for_all_layers(
    teacher_dir: Path, batch: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int | None] = []
    make = modernbert.document_mask

    def counted(documents: Documents, implementation: str | None, window: int | None) -> Any:
        windows.append(window)
        return make(documents, implementation, window)

    monkeypatch.setattr(modernbert, "document_mask", counted)
    encode_packed(load_teacher(str(teacher_dir)), batch)
    assert sorted(windows, key=str) == [WINDOW // 2, None]


def test_positions_restart_in_each_document_and_rotary_frequencies_stay_in_float32(
    teacher_dir: Path, batch: MicroBatch
) -> None:
    # Attention depends on differences of positions, so in float32 other positions would only be rounded otherwise.
    ours = ReplicatedTeacher(load_teacher(str(teacher_dir)), torch.bfloat16, torch.device("cpu"))
    theirs = AutoModelForMaskedLM.from_pretrained(teacher_dir, dtype=torch.bfloat16).eval()
    masks = FAMILY.attention_mask(theirs.config, documents_of(batch), SDPA)
    with torch.no_grad():
        expected = theirs(batch.input_ids, attention_mask=masks, position_ids=batch.position_ids).logits
    assert torch.equal(ours(batch).logits, expected)
