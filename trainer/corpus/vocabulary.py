"""Tokens that text may become, and a check that a tokenizer's normaliser fits its vocabulary."""

import json
import re

from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.corpus.training_objective import TrainingObjective
from distilspeed.trainer.errors import UserError

# Structure tokens, by transformers' names: text never becomes one, and they are never masked. Every other added token
# ("<url>", "[NUM]") stands for content.
STRUCTURE_TOKENS = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")
MLM_TOKENS = ("cls", "sep", "mask")

# Pieces with capitals that a lower-cased vocabulary may have: two, or this share of the pieces whose letters have upper
# and lower case. BERT's uncased vocabulary has capitals only in special tokens. A cased vocabulary has them in every
# third piece; the smallest possible one has a capital for each letter.
CAPITALS_SHARE = 0.05
CAPITALS_ODDITIES = 2
# "[unused1]" and "<s>" are names of tokens, not text.
_is_name = re.compile(r"\[.*\]|<.*>").fullmatch


def structure_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the sorted ids of the structure tokens that the tokenizer has."""
    ids = (getattr(tokenizer, f"{kind}_token_id") for kind in STRUCTURE_TOKENS)
    return tuple(sorted({token for token in ids if token is not None}))


def objective_of(tokenizer: PreTrainedTokenizerFast) -> TrainingObjective:
    """Return the objective of the corpora that a tokenizer makes.

    A tokenizer without [CLS], [SEP] and [MASK] but with an end-of-text token, such as GPT-2's, makes causal corpora.
    """
    has_mlm_token = any(getattr(tokenizer, f"{kind}_token_id") is not None for kind in MLM_TOKENS)
    return "masked" if has_mlm_token or tokenizer.eos_token_id is None else "causal"


def document_pipeline(tokenizer: PreTrainedTokenizerFast) -> str:
    """Serialise a tokenizer for :class:`~distilspeed.trainer.corpus.tokenization.DocumentTokenizer`.

    Only tokens that text never becomes are marked special: the structure tokens, and all special tokens if the
    tokenizer has ``split_special_tokens``.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    structure = structure_ids(tokenizer)
    for token in pipeline["added_tokens"]:
        splits = token["special"] and tokenizer.split_special_tokens
        token["special"] = token["id"] in structure or splits
    return json.dumps(pipeline)


def check_case(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a UserError if the tokenizer lower-cases text but its vocabulary is cased: "York" becomes y ##o ##r ##k.

    This happens to a cased model's folder that has only ``vocab.txt``: BERT's defaults lower-case.
    """
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is None or "A" in backend.normalizer.normalize_str("A"):
        return
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    pieces = [piece for piece in backend.get_vocab() if piece not in added and not _is_name(piece)]
    with_case = sum(piece.lower() != piece.upper() for piece in pieces)
    with_capitals = sum(piece.lower() != piece for piece in pieces)
    if with_capitals > max(CAPITALS_ODDITIES, CAPITALS_SHARE * with_case):
        raise UserError(
            "unusable-tokenizer",
            f"the tokenizer {name} lower-cases text, but {with_capitals:,} of the {with_case:,} pieces with letters in "
            'its vocabulary have capitals and can never match; set "do_lower_case": false in its '
            'tokenizer_config.json, and "lowercase": false in its tokenizer.json if it has one',
        )
