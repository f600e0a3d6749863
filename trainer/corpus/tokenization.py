"""Turn documents into token ids with the tokenizers library and a cache of words.

BERT's pipeline splits text at white space and around every punctuation mark, so the tokens of a document are the
tokens of its words, one after the other. The library tokenises each word that is not in the cache; for the others the
cache is enough. Only the library handles vocabulary, lower case, accents, Chinese characters and unknown words.
Tokenizers whose tokens include white space (GPT-2, RoBERTa) get whole documents. So does every tokenizer if a document
may contain an added token ("<url>").

Workers import this module, so it imports no torch, transformers or datasets.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress

import numpy as np
from tokenizers import Tokenizer

# BERT's pre-tokenizer splits wherever this pattern does. It also splits at other white space, other punctuation and
# Chinese characters; those stay inside a word here, and the library splits the word. Python's own white space would
# be wrong: BERT deletes \v, \f and other control characters and joins the text around them.
_words = re.compile(r"[^ \n\t!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]").findall

# Limits of the word cache; above them it is emptied. Of the 20 million words in 94 MB of Gutenberg prose, the library
# tokenises 3.5 % with a cache of 32768 words, 2.0 % with 65536, 1.2 % with 131072 and 0.8 % without a limit
# (November 2026).
REMEMBERED_WORDS = 65_536
REMEMBERED_CHARACTERS = 16 * REMEMBERED_WORDS
# Words of letters and digits are joined and encoded this many at a time: a call costs more than a word.
WORDS_PER_CALL = 1000


@dataclass(frozen=True)
class TokenizedDocuments:
    """``tokens``: [sum of lengths] int32, without special tokens. ``lengths``: [documents] int64, in tokens."""

    tokens: np.ndarray
    lengths: np.ndarray


class DocumentTokenizer:
    """Gives each document the same ids as ``tokenizers``.

    ``tokenizer_json``: a serialised `tokenizers` tokenizer. Text never becomes a special token: "[MASK]" in a document
    is ordinary text. Text does become other added tokens.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = _tokenizer_of(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        pipeline = json.loads(tokenizer_json)
        self._added_tokens = [token["content"] for token in pipeline["added_tokens"] if not token["special"]]
        self._words: _RememberedWords | None = None
        if words_are_independent(tokenizer_json):
            # Without added tokens: joined words must not form one ("New York").
            self._word_tokenizer = _tokenizer_of(json.dumps(pipeline | {"added_tokens": []}))
            self._words = _RememberedWords(self._word_tokenizer)

    def tokenize(self, documents: Sequence[str]) -> TokenizedDocuments:
        if self._words is None:
            return _join(_encode(self._tokenizer, documents))
        if self._words.are_too_many():
            self._words = _RememberedWords(self._word_tokenizer)
        is_whole = np.array([self._may_hold_added_token(document) for document in documents], dtype=bool)
        if not is_whole.any():
            return self._words.tokenize(documents)
        of_words = self._words.tokenize(list(compress(documents, ~is_whole)))
        whole = _join(_encode(self._tokenizer, list(compress(documents, is_whole))))
        return _interleave(of_words, whole, is_whole)

    def _may_hold_added_token(self, document: str) -> bool:
        return any(token in document for token in self._added_tokens)


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def words_are_independent(tokenizer_json: str) -> bool:
    """Return whether the tokens of a text are the tokens of its words, as in BERT's WordPiece.

    ``tokenizer_json``: a serialised tokenizer. The answer holds for text without added tokens. It is False for a
    tokenizer with an added token that matches normalised text, because any document may contain such a token.
    """
    pipeline = json.loads(tokenizer_json)
    parts = [(pipeline[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer", "model")]
    return (
        parts[0] in ("BertNormalizer", None)
        and parts[1:] == ["BertPreTokenizer", "WordPiece"]
        and all(token["special"] or not token["normalized"] for token in pipeline["added_tokens"])
    )


class _RememberedWords:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._numbers = _WordNumbers()
        self._characters = 0
        self._known = _join([])  # the tokens of word 0, of word 1, …

    def are_too_many(self) -> bool:
        return len(self._numbers) > REMEMBERED_WORDS or self._characters > REMEMBERED_CHARACTERS

    def tokenize(self, documents: Sequence[str]) -> TokenizedDocuments:
        number_of = self._numbers.__getitem__
        numbers: list[int] = []
        ends = [0]  # of the documents, in words
        for document in documents:
            numbers.extend(map(number_of, _words(document)))
            ends.append(len(numbers))
        self._learn(self._numbers.take_new())
        words = np.array(numbers, dtype=np.int32)
        lengths = self._known.lengths[words]
        word_ends = np.concatenate([[0], np.cumsum(lengths)])
        known_starts = np.cumsum(self._known.lengths) - self._known.lengths
        places = np.repeat(known_starts[words] - word_ends[:-1], lengths) + np.arange(word_ends[-1])
        return TokenizedDocuments(self._known.tokens[places], np.diff(word_ends[ends]))

    def _learn(self, words: list[str]) -> None:
        token_ids: list[list[int]] = [[] for _ in words]
        # A word of ASCII letters and digits is also one word to the library: word_ids tells the joined words apart.
        joined = [place for place, word in enumerate(words) if word.isascii() and word.isalnum()]
        for start in range(0, len(joined), WORDS_PER_CALL):
            places = joined[start : start + WORDS_PER_CALL]
            text = " ".join(words[place] for place in places)
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
                assert word is not None  # None only for added tokens, and there are none
                token_ids[places[word]].append(token)
        apart = sorted(set(range(len(words))).difference(joined))
        for place, ids in zip(apart, _encode(self._tokenizer, [words[p] for p in apart]), strict=True):
            token_ids[place] = ids
        learned = _join(token_ids)
        self._known = TokenizedDocuments(
            np.concatenate([self._known.tokens, learned.tokens]),
            np.concatenate([self._known.lengths, learned.lengths]),
        )
        self._characters += sum(map(len, words))


class _WordNumbers(dict[str, int]):
    """Numbers words in the order of their first look-up."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self._new.append(word)
        return number

    def take_new(self) -> list[str]:
        new, self._new = self._new, []
        return new


def _tokenizer_of(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _join(token_ids: Sequence[list[int]]) -> TokenizedDocuments:
    return TokenizedDocuments(
        np.fromiter(chain.from_iterable(token_ids), dtype=np.int32),
        np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids)),
    )


def _interleave(
    some: TokenizedDocuments, others: TokenizedDocuments, is_other: np.ndarray
) -> TokenizedDocuments:
    """Merge two batches in document order; ``is_other`` ([documents] bool): the document comes from ``others``."""
    lengths = np.empty(len(is_other), dtype=np.int64)
    lengths[~is_other], lengths[is_other] = some.lengths, others.lengths
    is_others_token = np.repeat(is_other, lengths)
    tokens = np.empty(len(is_others_token), dtype=np.int32)
    tokens[~is_others_token], tokens[is_others_token] = some.tokens, others.tokens
    return TokenizedDocuments(tokens, lengths)
