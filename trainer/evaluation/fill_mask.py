"""A model's most probable tokens for the mask of a text, to see what a model has learnt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distilspeed.trainer.corpus.format import Corpus
from distilspeed.trainer.errors import UserError

SHOWN = 3  # tokens


@dataclass(frozen=True)
class Guess:
    """A token for the mask, and its probability."""

    token: str  # as text; a token of white space as in the vocabulary
    probability: float


def check_texts(texts: Sequence[str], corpus: Corpus, positions: int) -> None:
    """Raise a UserError unless every text has one mask and fits the positions of the models."""
    if not texts:
        return
    tokenizer = corpus.load_tokenizer()
    if corpus.manifest.mask_id is None:
        raise UserError(
            "conflicting-arguments",
            f"--fill_mask needs a mask, and the corpus {corpus.path} is for causal language models; omit --fill_mask",
        )
    for text in texts:
        # Bytes of a command line that are not UTF-8 become surrogates, which cannot be tokenised.
        if text.encode("utf-8", "replace").decode() != text:
            raise UserError("bad-argument", f"--fill_mask {text[:60]!r} is not UTF-8; convert it to UTF-8")
        ids = tokenizer(text)["input_ids"]
        masks = ids.count(tokenizer.mask_token_id)
        if masks != 1 or len(ids) > positions:
            found = f"{masks} masks" if masks != 1 else f"{len(ids)} tokens"
            raise UserError(
                "bad-argument",
                f"--fill_mask {text[:60]!r} has {found}; give a text of at most {positions} tokens with one "
                f"{tokenizer.mask_token}",
            )


@torch.inference_mode()
def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> tuple[tuple[Guess, ...], ...]:
    """Return the ``SHOWN`` most probable tokens for the mask of each text, the most probable first."""
    model.eval()
    guesses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        logits = model(input_ids=ids).logits[0, ids[0] == tokenizer.mask_token_id, : len(tokenizer)]
        probabilities, tokens = logits[0].float().softmax(dim=-1).topk(SHOWN)
        guesses.append(
            tuple(
                Guess(_shown(tokenizer, token), probability)
                for token, probability in zip(tokens.tolist(), probabilities.tolist(), strict=True)
            )
        )
    return tuple(guesses)


def _shown(tokenizer: PreTrainedTokenizerFast, token: int) -> str:
    return str(tokenizer.decode([token])).strip() or str(tokenizer.convert_ids_to_tokens(token))
