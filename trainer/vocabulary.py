"""Which tokens of a tokenizer text may become, and whether its normaliser fits its vocabulary."""

import json

from transformers import PreTrainedTokenizerFast

# The tokens that give a row its structure, by transformers' names: text never becomes one of them and they are never
# masked. Every other added token ("<url>", "[NUM]") stands for content.
STRUCTURE_TOKENS = ("pad", "cls", "sep", "mask", "unk", "bos", "eos")


def structure_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The ids of the structure tokens that the tokenizer has, in order."""
    ids = (getattr(tokenizer, f"{kind}_token_id") for kind in STRUCTURE_TOKENS)
    return tuple(sorted({token for token in ids if token is not None}))


def document_pipeline(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer as a :class:`~distilspeed.trainer.tokenization.DocumentTokenizer` takes it, serialised.

    Only what text never becomes is special in it: the structure tokens, and all that are special to a tokenizer that
    splits special tokens in text itself (``split_special_tokens``).
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    structure = structure_ids(tokenizer)
    for token in pipeline["added_tokens"]:
        splits = token["special"] and tokenizer.split_special_tokens
        token["special"] = token["id"] in structure or splits
    return json.dumps(pipeline)
