"""Which tokens of a tokenizer text may become, and whether its normaliser fits its vocabulary."""

import json
import re

from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.errors import UserError

# The tokens that give a row its structure, by transformers' names: text never becomes one of them and they are never
# masked. Every other added token ("<url>", "[NUM]") stands for content.
STRUCTURE_TOKENS = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")

# Capitals that a lower-cased vocabulary may hold: an oddity or two, or this share of its pieces with letters that have
# a case. BERT's uncased vocabulary has none but in its special tokens; a cased one has them in every third piece, and
# the smallest in one for each letter.
CAPITALS_SHARE = 0.05
CAPITALS_ODDITIES = 2
# "[unused1]" and "<s>" are names, whatever their letters.
_is_name = re.compile(r"\[.*\]|<.*>").fullmatch


def structure_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids of the structure tokens that the tokenizer has, in order."""
    ids = (getattr(tokenizer, f"{kind}_token_id") for kind in STRUCTURE_TOKENS)
    return tuple(sorted({token for token in ids if token is not None}))


def document_pipeline(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer as a :class:`~distilspeed.trainer.corpus.tokenization.DocumentTokenizer` takes it, serialised.

    Only what text never becomes is special in it: the structure tokens, and all that are special to a tokenizer that
    splits special tokens in text itself (``split_special_tokens``).
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    structure = structure_ids(tokenizer)
    for token in pipeline["added_tokens"]:
        splits = token["special"] and tokenizer.split_special_tokens
        token["special"] = token["id"] in structure or splits
    return json.dumps(pipeline)


def check_case(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise a UserError where text is lower-cased and the vocabulary is not: "York" would become y ##o ##r ##k.

    A folder with ``vocab.txt`` alone is read with BERT's defaults, which lower-case.
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
            f"the tokenizer {name} lower-cases text, but {with_capitals:,} of its vocabulary's {with_case:,} pieces "
            'of letters have capitals and can never match; set "do_lower_case": false in its '
            'tokenizer_config.json, and "lowercase": false in tokenizer.json where there is one',
        )
