"""GPT-2: what cannot be distilled, the decoders that have no family, and its forward pass in training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.evaluation.latency import measure_latency
from distilspeed.trainer.families.registry import checked_teacher_family, family_of
from distilspeed.trainer.models.loading import load_teacher
from distilspeed.trainer.models.packed_forward import encode_packed


def test_a_distilgpt2_starts_from_the_layers_of_the_published_one() -> None:
    config = GPT2Config()
    assert family_of(config).default_layers(config) == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize("setting", ["add_cross_attention", "scale_attn_by_inverse_layer_idx"])
def test_settings_that_a_student_could_not_share_are_refused(setting: str) -> None:
    with raises_user_error("unsupported-model", "the teacher mine", setting):
        checked_teacher_family(GPT2Config(**{setting: True}), "the teacher mine")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gpt_neox", "t5", "bart"])
def test_other_decoders_are_refused_by_name(model_type: str) -> None:
    with raises_user_error("unsupported-model", f'the teacher mine is a "{model_type}" model', '"gpt2"'):
        checked_teacher_family(AutoConfig.for_model(model_type), "the teacher mine")


def test_no_keys_and_values_are_kept_for_generation(
    family_dirs: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distilspeed.trainer.evaluation.latency.SECONDS", 0.05)
    folders = family_dirs("gpt2")
    model = load_teacher(str(folders.teacher))
    batch = MicroBatches(open_corpus(folders.corpus), BatchEquation(2, 2, 1, 1), rank=0, seed=0)[0]
    options: list[dict[str, Any]] = []
    model.base_model.register_forward_pre_hook(
        lambda module, inputs, given: options.append(given), with_kwargs=True
    )
    encode_packed(model, batch)
    measure_latency([model], batch.input_ids[:1], torch.device("cpu"))
    assert len(options) > 1
    assert not any(given["use_cache"] for given in options)
