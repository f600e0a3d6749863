"""A tiny teacher of each family, with a tokenizer of its kind that is trained on the spot."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer, processors
from transformers import (
    AutoTokenizer,
    CamembertConfig,
    CamembertTokenizer,
    DistilBertConfig,
    GPT2Config,
    GPT2Tokenizer,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaTokenizer,
)

from distilspeed.trainer.families.registry import family_of

VOCABULARY = 1000
LAYERS = 4
POSITIONS = 64  # the length of the corpora's rows
WINDOW = 16  # of ModernBERT: narrower than most documents

# The names that most configs share.
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,  # large, so that predictions differ from uniform
}


@dataclass(frozen=True)
class TinyFamily:
    """How to make a teacher and its tokenizer.

    Attributes:
        tokenizer: makes a tokenizer from paragraphs of text; None for the WordPiece tokenizer of the other tests.
        config: makes the config for a tokenizer.
        layers: the path of the list of layers in the model.
    """

    tokenizer: Callable[[list[str]], PreTrainedTokenizerFast] | None
    config: Callable[[PreTrainedTokenizerFast], PreTrainedConfig]
    layers: str


def byte_level_pieces(text: list[str], special: Sequence[str]) -> dict[str, Any]:
    """Train byte-level BPE; return its vocabulary and merges, as RoBERTa's and GPT-2's tokenizers take them."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(text, VOCABULARY, show_progress=False, special_tokens=list(special))
    model = trained._tokenizer.to_str()
    parts = json.loads(model)["model"]
    return {"vocab": parts["vocab"], "merges": [tuple(merge) for merge in parts["merges"]]}


def unigram_pieces(text: list[str]) -> list[tuple[str, float]]:
    """Train a Unigram model, as SentencePiece does; return its pieces and their scores, without special tokens."""
    trained = SentencePieceUnigramTokenizer()
    trained.train_from_iterator(text, VOCABULARY - 10, show_progress=False, unk_token="<unk>")
    parts = json.loads(trained._tokenizer.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in parts if piece != "<unk>"]


def roberta_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    return RobertaTokenizer(**byte_level_pieces(text, ("<s>", "<pad>", "</s>", "<unk>", "<mask>")))


def xlm_roberta_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    first = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*first, *unigram_pieces(text), ("<mask>", 0.0)])


def camembert_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    # As in the published CamemBERT: four ids of fairseq's that nothing uses, then those of SentencePiece.
    first = [
        (token, 0.0)
        for token in ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>")
    ]
    return CamembertTokenizer(vocab=[*first, *unigram_pieces(text), ("<mask>", 0.0)])


def modernbert_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    special = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
    trained.train_from_iterator(text, VOCABULARY, show_progress=False, special_tokens=list(special))
    tokenizer = trained._tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, special, strict=True)),
    )


def roberta_like(kind: type[PreTrainedConfig]) -> Callable[[PreTrainedTokenizerFast], PreTrainedConfig]:
    def config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
        return kind(
            **SIZES,
            vocab_size=len(tokenizer),
            max_position_embeddings=POSITIONS + tokenizer.pad_token_id + 1,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    return config


def distilbert_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return DistilBertConfig(
        vocab_size=len(tokenizer),
        dim=SIZES["hidden_size"],
        n_layers=LAYERS,
        n_heads=SIZES["num_attention_heads"],
        hidden_dim=SIZES["intermediate_size"],
        dropout=0.0,
        attention_dropout=0.0,
        initializer_range=SIZES["initializer_range"],
        max_position_embeddings=POSITIONS,
    )


def modernbert_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return a config with global attention in the first and last layer, and a window in the two between."""
    return ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=SIZES["hidden_size"],
        num_hidden_layers=LAYERS,
        num_attention_heads=SIZES["num_attention_heads"],
        intermediate_size=SIZES["intermediate_size"],
        initializer_range=SIZES["initializer_range"],
        max_position_embeddings=POSITIONS,
        local_attention=WINDOW,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )


def gpt2_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    return GPT2Tokenizer(**byte_level_pieces(text, ("<|endoftext|>",)))


def gpt2_config(tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=SIZES["hidden_size"],
        n_layer=LAYERS,
        n_head=SIZES["num_attention_heads"],
        n_inner=SIZES["intermediate_size"],
        n_positions=POSITIONS,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=SIZES["initializer_range"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


# By model type. BERT itself is the teacher of all other tests.
TINY_FAMILIES = {
    "distilbert": TinyFamily(None, distilbert_config, "distilbert.transformer.layer"),
    "roberta": TinyFamily(roberta_tokenizer, roberta_like(RobertaConfig), "roberta.encoder.layer"),
    "xlm-roberta": TinyFamily(xlm_roberta_tokenizer, roberta_like(XLMRobertaConfig), "roberta.encoder.layer"),
    "camembert": TinyFamily(camembert_tokenizer, roberta_like(CamembertConfig), "roberta.encoder.layer"),
    "modernbert": TinyFamily(modernbert_tokenizer, modernbert_config, "model.layers"),
    "gpt2": TinyFamily(gpt2_tokenizer, gpt2_config, "transformer.h"),
}


def save_teacher(name: str, text: list[str], wordpiece_dir: Path, folder: Path) -> None:
    """Save a teacher with random weights and its tokenizer."""
    tiny = TINY_FAMILIES[name]
    tokenizer = tiny.tokenizer(text) if tiny.tokenizer else AutoTokenizer.from_pretrained(wordpiece_dir)
    config = tiny.config(tokenizer)
    torch.manual_seed(0)
    family_of(config).model_class.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shorten(model: torch.nn.Module, name: str, layers: Sequence[int]) -> None:
    """Remove all other layers from a teacher."""
    parent, _, attribute = TINY_FAMILIES[name].layers.rpartition(".")
    module = model.get_submodule(parent)
    all_layers = getattr(module, attribute)
    setattr(module, attribute, torch.nn.ModuleList(all_layers[layer] for layer in layers))
