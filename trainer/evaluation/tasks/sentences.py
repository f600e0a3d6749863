"""Labelled sentences and sentence pairs, for the tasks that use them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.evaluation.tasks.task import Feature


@dataclass(frozen=True)
class Example:
    """A sentence or sentence pair, and its label: the index of a class, or a number."""

    text: str
    pair: str | None
    label: int | float


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Feature]:
    """Tokenise each example, truncate it to ``max_length`` tokens, and add its label as ``labels``."""
    pairs = [example.pair for example in examples if example.pair is not None]
    encoded = tokenizer(
        [example.text for example in examples],
        pairs or None,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,  # a tokenizer saved with DistilBERT leaves them out by default
    )
    return [
        {key: values[index] for key, values in encoded.items()} | {"labels": example.label}
        for index, example in enumerate(examples)
    ]
