"""BERT's relatives and old checkpoints: a student with all layers gives the logits that transformers gives."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, PreTrainedModel

from distilspeed.trainer.models.loading import load_teacher, make_student

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MULTILINGUAL_VOCABULARY = 119_547

Renaming = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def bert(folder: Path, **config: object) -> Path:
    return saved(
        BertForMaskedLM(BertConfig(**({"vocab_size": 70} | SIZES | config), initializer_range=0.2)), folder
    )


def rewritten(folder: Path, rename: Renaming) -> Path:
    path = folder / "model.safetensors"
    save_file(rename(load_file(path)), path, {"format": "pt"})
    return folder


def with_next_sentence_head(folder: Path) -> Path:
    config = BertConfig(vocab_size=70, **SIZES, initializer_range=0.2)
    return saved(BertForPreTraining(config), folder)


def named_as_in_tensorflow(folder: Path) -> Path:
    """Layer norms as the first checkpoints name them, and the buffer of positions that transformers 4 saved."""

    def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {
            next((name.replace(new, old) for new, old in names.items() if name.endswith(new)), name): weight
            for name, weight in weights.items()
        }
        assert renamed.keys() != weights.keys()
        return renamed | {"bert.embeddings.position_ids": torch.arange(512)[None]}

    return rewritten(bert(folder), rename)


def in_half_precision(folder: Path) -> Path:
    return rewritten(bert(folder), lambda weights: {name: weight.half() for name, weight in weights.items()})


def sharded(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=70, **SIZES, initializer_range=0.2)
    saved(BertForMaskedLM(config), folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def without_settings_of_today(folder: Path) -> Path:
    """A config with no more than the original's settings."""
    bert(folder)
    config = json.loads((folder / "config.json").read_text())
    kept = (*SIZES, "vocab_size", "hidden_act", "max_position_embeddings", "type_vocab_size", "model_type")
    (folder / "config.json").write_text(json.dumps({name: config[name] for name in kept}))
    return folder


RELATIVES: dict[str, Callable[[Path], Path]] = {
    "multilingual vocabulary": lambda folder: bert(folder, vocab_size=MULTILINGUAL_VOCABULARY),
    "one token type": lambda folder: bert(folder, type_vocab_size=1),
    "four token types": lambda folder: bert(folder, type_vocab_size=4),
    "relu": lambda folder: bert(folder, hidden_act="relu"),
    "gelu_new": lambda folder: bert(folder, hidden_act="gelu_new"),
    "silu": lambda folder: bert(folder, hidden_act="silu"),
    "1024 positions": lambda folder: bert(folder, max_position_embeddings=1024),
    "padding index 3": lambda folder: bert(folder, pad_token_id=3),
    "half precision": in_half_precision,
    "sharded": sharded,
    "next-sentence head": with_next_sentence_head,
    "TensorFlow's names": named_as_in_tensorflow,
    "old config": without_settings_of_today,
}


@torch.no_grad()
@pytest.mark.parametrize("relative", RELATIVES)
def test_a_student_with_all_layers_gives_the_logits_that_transformers_gives(
    relative: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    folder = RELATIVES[relative](tmp_path / "teacher")
    ids = torch.arange(70)[None]
    expected = BertForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    student = make_student(load_teacher(str(folder)), range(2)).eval()
    torch.testing.assert_close(student(ids).logits, expected, rtol=1e-5, atol=1e-5)
