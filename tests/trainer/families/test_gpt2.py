"""GPT-2's settings that cannot be distilled, and the decoders that have no family."""

import pytest
from transformers import AutoConfig, GPT2Config
from user_errors import raises_user_error

from distilspeed.trainer.families.registry import checked_teacher_family, family_of


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
