"""Token ids from words equal the ids that the tokenizers library gives to whole documents."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.corpus import tokenization
from distilspeed.trainer.corpus.tokenization import (
    DocumentTokenizer,
    TokenizedDocuments,
    words_are_independent,
)
from distilspeed.trainer.corpus.vocabulary import document_pipeline, structure_ids

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES = [
    *SPECIAL,
    *"abcdeéßσς1.,;-'[]中文",
    *(f"##{letter}" for letter in "abcdeéσς1"),
    "mask",
    "cab",
    "##cab",
]
# Characters that tokenizers treat differently from Python: deleted and joined characters, white space of all kinds,
# combining marks, a letter whose lower case is two characters, final sigma, punctuation beyond ASCII, a character that
# decomposes to ";".
HOSTILE = (
    "abCD\u00c9e\u0301\u0130\u03a3\u03c3\u00df 1.,;-'[]“”—\u037e中文\U0001f600"
    "\t\n\r\v\f\x00\x1c\x85\xa0\u2003\u200b\u3000\ufeff\ufffd"
)
hostile_text = st.text(st.sampled_from(HOSTILE), max_size=40)


def bert_tokenizer(lowercase: bool, strip_accents: bool | None, clean_text: bool) -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordPiece({piece: number for number, piece in enumerate(PIECES)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=clean_text, lowercase=lowercase, strip_accents=strip_accents
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def by_document(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.encode_special_tokens = True
    return [whole.encode(document, add_special_tokens=False).ids for document in documents]


def as_lists(tokenized: TokenizedDocuments) -> list[list[int]]:
    ends = tokenized.lengths.cumsum()
    return [
        tokenized.tokens[end - length : end].tolist()
        for end, length in zip(ends, tokenized.lengths, strict=True)
    ]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("clean_text", [True, False])
@settings(max_examples=150)
@given(st.lists(hostile_text | st.text(max_size=20), max_size=5))
@example(["ab\x0ccd ab\x1ccd", "ab.\u0301cd", "ab\u0301 cd", "", "[MASK] [mask] abc", "\u037e;", "a" * 200])
def test_words_give_the_tokens_of_the_document(
    lowercase: bool, strip_accents: bool | None, clean_text: bool, documents: list[str]
) -> None:
    tokenizer = bert_tokenizer(lowercase, strip_accents, clean_text)
    assert words_are_independent(tokenizer.to_str())
    assert as_lists(DocumentTokenizer(tokenizer.to_str()).tokenize(documents)) == by_document(
        tokenizer, documents
    )


def test_tokens_do_not_depend_on_earlier_documents(
    reference_text: Path, small_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_file(str(small_tokenizer_dir / "tokenizer.json"))
    documents = reference_text.read_text(encoding="utf-8").splitlines()[:600]
    for limit, characters in ((1 << 16, 1 << 20), (50, 1 << 20), (1 << 16, 200)):
        monkeypatch.setattr(tokenization, "REMEMBERED_WORDS", limit)
        monkeypatch.setattr(tokenization, "REMEMBERED_CHARACTERS", characters)
        remembering = DocumentTokenizer(tokenizer.to_str())
        for start in range(0, 600, 100):
            part = documents[start : start + 100]
            assert as_lists(remembering.tokenize(part)) == by_document(tokenizer, part)


def test_the_cache_holds_at_most_its_limit_and_one_batch_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "REMEMBERED_WORDS", 100)
    remembering = DocumentTokenizer(bert_tokenizer(True, None, True).to_str())
    for start in range(0, 1000, 10):
        remembering.tokenize([f"a{number}" for number in range(start, start + 10)])
        assert remembering._words is not None
        assert len(remembering._words._numbers) <= 110


def spanning_added_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("cab cab")])


def whole_text_normalizer(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace("b c", "d")


def white_space_in_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


@pytest.mark.parametrize("change", [spanning_added_token, whole_text_normalizer, white_space_in_tokens])
def test_a_tokenizer_whose_tokens_span_words_gets_whole_documents(change: object) -> None:
    tokenizer = bert_tokenizer(True, None, True)
    change(tokenizer)  # type: ignore[operator]
    documents = ["a cab cab, ab cd", "", "b c"]
    assert not words_are_independent(tokenizer.to_str())
    assert as_lists(DocumentTokenizer(tokenizer.to_str()).tokenize(documents)) == by_document(
        tokenizer, documents
    )


# --- added tokens ---------------------------------------------------------------------------------------


def with_added_tokens(tokens: list[AddedToken], **options: bool) -> PreTrainedTokenizerFast:
    """Return a BERT tokenizer with added tokens, as loaded from a teacher's folder."""
    names = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bert_tokenizer(True, None, True), **names, **options)
    for token in tokens:
        tokenizer.add_tokens([token], special_tokens=token.special)
    return tokenizer


added_tokens = st.lists(
    st.builds(
        AddedToken,
        # With punctuation, with letters only, with white space inside, and a piece of the vocabulary.
        st.sampled_from(["<url>", "[NUM]", "NUM", "ab", "ab cab", "dé", "mask"]),
        single_word=st.booleans(),
        lstrip=st.booleans(),
        rstrip=st.booleans(),
        normalized=st.booleans(),
        special=st.booleans(),
    ),
    max_size=4,
    unique_by=lambda token: token.content,
)
with_their_content = st.lists(
    st.sampled_from(["<url>", "<URL>", "[NUM]", "[num]", "NUM", "num", "ab", "cab", "dé", "de", "mask"])
    | st.sampled_from([" ", "  ", "\n", "a", "1", ".", "[", "中", "É"]),
    max_size=12,
).map("".join)


@settings(max_examples=300)
@given(added_tokens, st.booleans(), st.lists(with_their_content, max_size=5))
@example([AddedToken("<url>", special=True, normalized=False)], False, ["a <url>b", "cab", "<url>", ""])
# Two words that must not form an added token when they are joined, and an added token that is a word of letters.
@example([AddedToken("ab cab", special=True, normalized=False)], False, ["ab", "cab", "ab cab"])
@example([AddedToken("NUM", special=True, normalized=False)], False, ["a NUM b", "aNUM", "num a"])
def test_added_tokens_get_the_same_ids_as_from_the_tokenizer(
    tokens: list[AddedToken], splits: bool, documents: list[str]
) -> None:
    tokenizer = with_added_tokens(tokens, split_special_tokens=splits)
    expected = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]
    assert as_lists(DocumentTokenizer(document_pipeline(tokenizer)).tokenize(documents)) == expected


@pytest.mark.parametrize("normalized", [True, False])
def test_text_becomes_an_added_token_but_never_a_structure_token(normalized: bool) -> None:
    url = AddedToken("<url>", special=True, normalized=normalized)
    tokenizer = with_added_tokens([url, AddedToken("[NUM]", normalized=normalized)])
    reading = DocumentTokenizer(document_pipeline(tokenizer))
    [ids] = as_lists(reading.tokenize(["a [MASK] <url> [CLS][NUM] [PAD][SEP] cab"]))
    numbers = [ids.count(token) for token in tokenizer.convert_tokens_to_ids(["<url>", "[NUM]", "cab"])]
    assert numbers == [1, 1, 1]
    assert set(ids).isdisjoint(set(structure_ids(tokenizer)) - {tokenizer.unk_token_id})
    assert ids.count(tokenizer.convert_tokens_to_ids("[")) == 4


def test_only_documents_that_may_contain_an_added_token_are_tokenised_whole() -> None:
    tokenizer = with_added_tokens([AddedToken("<url>", special=True, normalized=False)])
    reading = DocumentTokenizer(document_pipeline(tokenizer))
    reading.tokenize(["cab abc", "see <url> bead"])
    assert reading._words is not None
    assert set(reading._words._numbers) == {"cab", "abc"}


def test_truncation_padding_and_special_tokens_of_a_saved_tokenizer_have_no_effect() -> None:
    tokenizer = BertWordPieceTokenizer(vocab={piece: number for number, piece in enumerate(PIECES)})
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    [ids] = as_lists(DocumentTokenizer(tokenizer._tokenizer.to_str()).tokenize(["a [MASK] [PAD] cab"]))
    assert [PIECES[token] for token in ids if PIECES[token] != "[UNK]"] == [
        "a",
        "[",
        "mask",
        "]",
        "[",
        "]",
        "cab",
    ]
