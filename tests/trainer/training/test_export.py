"""Promises of the exported folder that need no training; tests/launch/test_train.py tests those of a full run."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from distilspeed.trainer.corpus.format import Corpus, tokenizer_hash
from distilspeed.trainer.models.inputs import tokenizer_for
from distilspeed.trainer.models.loading import load_teacher, make_student


@pytest.mark.parametrize(
    ("architecture", "inputs"),
    [
        ("bert", ["input_ids", "token_type_ids", "attention_mask"]),
        ("distilbert", ["input_ids", "attention_mask"]),
        ("bert with one token type", ["input_ids", "attention_mask"]),  # id 1 would be out of range
    ],
)
def test_the_exported_tokenizer_is_the_corpus_tokenizer_and_returns_only_the_models_inputs(
    architecture: str, inputs: list[str], corpus: Corpus, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    """DistilBERT takes no token types, but transformers before 5 passes everything that the tokenizer returns."""
    model: PreTrainedModel = load_teacher(str(tiny_teacher_dir))
    if architecture == "distilbert":
        model = make_student(load_teacher(str(tiny_teacher_dir)), (0, 3))
    if architecture == "bert with one token type":
        model.config.type_vocab_size = 1
    tokenizer_for(model, corpus.load_tokenizer()).save_pretrained(tmp_path)

    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"] == inputs
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert list(saved("the list")) == inputs
    assert tokenizer_hash(saved) == corpus.manifest.tokenizer_hash
