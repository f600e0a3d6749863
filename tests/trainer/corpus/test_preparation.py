"""Preparing a corpus: its content, and no partial output after a failure."""

import errno
import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, BertTokenizer
from user_errors import raises_user_error

from distilspeed.trainer.corpus import writer
from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.format import Corpus, load_tokenizer
from distilspeed.trainer.corpus.merge import merge_shards
from distilspeed.trainer.corpus.shard import Shard
from distilspeed.trainer.corpus.writer import is_held_out
from distilspeed.trainer.data.batches import corpus_masking_rule

PiecesOf = Callable[[datasets.Dataset], list[tuple[int, ...]]]
SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TEACHER = SHARED_DATA / "teacher-minilm"
needs_teacher = pytest.mark.skipif(not TEACHER.is_dir(), reason="needs ../shared/data/teacher-minilm")

# --- content of a corpus --------------------------------------------------------------------------------


def test_train_and_held_out_contain_every_piece_of_the_text_once(
    small_corpus_dir: Path, corpus: Corpus, pieces_of: PiecesOf
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_corpus_dir / "tokenizer")
    expected: Counter[tuple[int, ...]] = Counter()
    for line in (small_corpus_dir.parent / "reference.txt").read_text(encoding="utf-8").splitlines():
        token_ids = tokenizer(line, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for start in range(0, len(token_ids), 62):
            part = token_ids[start : start + 62]
            if len(part) >= 10:
                expected[(tokenizer.cls_token_id, *part, tokenizer.sep_token_id)] += 1
    assert corpus.manifest.counts.dropped_unknown == 0
    assert Counter(pieces_of(corpus.train) + pieces_of(corpus.held_out)) == expected
    assert corpus.manifest.counts.pieces == expected.total()


def test_the_columns_of_a_row_are_consistent(corpus: Corpus) -> None:
    special = set(corpus.load_tokenizer().all_special_ids)
    for row in [*corpus.train, *corpus.held_out]:
        real = sum(row["document_lengths"])
        assert row["real_tokens"] == real
        assert row["input_ids"][real:] == [corpus.manifest.pad_id] * (64 - real)
        assert corpus.manifest.pad_id not in row["input_ids"][:real]
        assert row["maskable_tokens"] == sum(token not in special for token in row["input_ids"][:real])


def test_rows_are_stored_as_uint16_and_can_be_read_with_datasets(small_corpus_dir: Path) -> None:
    train = datasets.load_from_disk(str(small_corpus_dir / "train"))
    assert train.features["input_ids"] == datasets.List(datasets.Value("uint16"), length=64)
    assert train.cache_files, "the rows are mapped from the file, not held in memory"


def test_token_counts_count_the_real_tokens_of_train(corpus: Corpus, pieces_of: PiecesOf) -> None:
    counted = Counter(token for piece in pieces_of(corpus.train) for token in piece)
    assert corpus.token_counts.dtype == np.int64
    assert corpus.token_counts.shape == (corpus.manifest.vocab_size,)
    assert {token: count for token, count in enumerate(corpus.token_counts) if count} == counted


def test_the_counts_of_the_manifest_match_the_rows(corpus: Corpus) -> None:
    counts = corpus.manifest.counts
    assert (counts.train_rows, counts.held_out_rows) == (len(corpus.train), len(corpus.held_out))
    assert counts.train_tokens == sum(corpus.train["real_tokens"]) == corpus.token_counts.sum()
    assert counts.held_out_tokens == sum(corpus.held_out["real_tokens"])
    real = counts.train_tokens + counts.held_out_tokens
    places = 64 * (counts.train_rows + counts.held_out_rows)
    assert corpus.manifest.padding_fraction == pytest.approx((places - real) / places)
    assert corpus.manifest.padding_fraction < 0.02


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1 / 3, 0.499])
def test_held_out_rows_are_the_requested_fraction(fraction: float) -> None:
    for rows in (2, 10, 999, 10_000):
        held_out = sum(is_held_out(row, fraction) for row in range(rows))
        assert 1 <= held_out < rows
        assert abs(held_out - rows * fraction) <= 1


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    arguments: CorpusArguments, tmp_path: Path
) -> None:
    prepare_corpus(arguments)
    prepare_corpus(replace(arguments, num_proc=2, output_dir=tmp_path / "other"))
    files = [path for path in arguments.output_dir.rglob("*") if path.is_file()]
    assert len(files) >= 9
    for path in files:
        other = tmp_path / "other" / path.relative_to(arguments.output_dir)
        assert path.read_bytes() == other.read_bytes(), path


def test_a_corpus_contains_no_path_of_the_machine(arguments: CorpusArguments, tmp_path: Path) -> None:
    corpus = prepare_corpus(arguments)
    assert corpus.manifest.sources[0].name == "some.txt"
    assert corpus.manifest.sources[0].bytes == arguments.text[0].stat().st_size
    for path in corpus.path.rglob("*"):
        assert not path.is_file() or str(tmp_path.parent).encode() not in path.read_bytes(), path


@needs_teacher
@pytest.mark.parametrize("seq_length", [128, 512])
def test_speeches_with_a_real_teachers_tokenizer_have_under_two_percent_padding(
    tmp_path: Path, seq_length: int
) -> None:
    corpus = prepare_corpus(
        CorpusArguments(
            tokenizer=str(TEACHER),
            text=(SHARED_DATA / "corpus" / "inaugural.txt",),
            output_dir=tmp_path / "corpus",
            seq_length=seq_length,
        )
    )
    assert corpus.manifest.padding_fraction < 0.02
    assert corpus.load_tokenizer().decode(corpus.train[0]["input_ids"]).startswith("[CLS] ")


def test_added_tokens_are_tokenised_as_by_the_tokenizer_and_can_be_masked(
    arguments: CorpusArguments, tmp_path: Path, pieces_of: PiecesOf
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<url>"]})
    tokenizer.add_tokens(["[NUM]"])
    tokenizer.save_pretrained(tmp_path / "added")
    documents = [
        f"{number} statements are found in the list: see <url> and [NUM] items" for number in range(100)
    ]
    (tmp_path / "tweets.txt").write_text("\n".join(documents))
    corpus = prepare_corpus(
        replace(arguments, text=(tmp_path / "tweets.txt",), tokenizer=str(tmp_path / "added"))
    )
    expected = Counter(
        token
        for document in documents
        for token in tokenizer(document, add_special_tokens=False)["input_ids"]
    )
    found = Counter(
        token
        for split in (corpus.train, corpus.held_out)
        for piece in pieces_of(split)
        for token in piece[1:-1]
    )
    for token in tokenizer.convert_tokens_to_ids(["<url>", "[NUM]"]):
        assert found[token] == expected[token] == len(documents)
        assert token not in corpus.manifest.special_ids
        assert corpus_masking_rule(corpus).sampling_weights[token] > 0
    assert set(corpus.manifest.special_ids) == {
        getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "unk", "cls", "sep", "mask")
    }


def test_a_large_vocabulary_gets_wider_ids(arguments: CorpusArguments, tmp_path: Path) -> None:
    vocabulary = (Path(arguments.tokenizer) / "vocab.txt").read_text(encoding="utf-8")
    unheard = "".join(f"unheard{number}\n" for number in range(66_000))
    (tmp_path / "vocab.txt").write_text(vocabulary + unheard, encoding="utf-8")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "large")
    corpus = prepare_corpus(replace(arguments, tokenizer=str(tmp_path / "large")))
    assert corpus.train.features["input_ids"] == datasets.List(datasets.Value("int32"), length=64)
    assert len(corpus.token_counts) == corpus.manifest.vocab_size > 1 << 16


def test_sources_are_mixed_in_the_order_given(arguments: CorpusArguments, tmp_path: Path) -> None:
    [text] = arguments.text
    folder = tmp_path / "more"
    datasets.Dataset.from_dict(
        {"text": ["a statement of which no other text knows anything " * 3]}
    ).save_to_disk(str(folder))
    corpus = prepare_corpus(replace(arguments, text=(text, text), dataset=(str(folder),)))
    assert [source.name for source in corpus.manifest.sources] == ["some.txt", "some.txt", "more"]
    assert corpus.manifest.counts.documents == 201


def test_documents_without_text_are_counted_by_reason(arguments: CorpusArguments, tmp_path: Path) -> None:
    [text] = arguments.text
    texts = [*text.read_text(encoding="utf-8").splitlines(), None, "", " \t", None, "\u3000", None]
    lines = tmp_path / "more.jsonl.gz"
    lines.write_bytes(gzip.compress("\n".join(json.dumps({"text": value}) for value in texts).encode()))
    blank = tmp_path / "blank.txt"
    blank.write_bytes(text.read_bytes() + b"\n\n \n")
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(saved))
    several = replace(arguments, text=(lines, blank), dataset=(str(saved),))
    whole = prepare_corpus(several).manifest.counts
    assert (whole.documents, whole.dropped_null, whole.dropped_blank) == (300, 6, 8)
    assert whole.documents_read == 314
    shards = [
        prepare_corpus(replace(several, shard=Shard(index, 2), output_dir=tmp_path / str(index)))
        for index in range(2)
    ]
    merged = merge_shards([shard.path for shard in shards], tmp_path / "merged").manifest.counts
    assert (merged.documents, merged.dropped_null, merged.dropped_blank) == (300, 6, 8)


def test_sentences_between_blank_lines_are_one_document(
    arguments: CorpusArguments, tmp_path: Path, pieces_of: PiecesOf
) -> None:
    lines = arguments.text[0].read_text(encoding="utf-8").splitlines()
    documents = [lines[start : start + 3] for start in range(0, 99, 3)]
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("\n\n".join("\n".join(document) for document in documents), encoding="utf-8")
    joined = tmp_path / "joined.txt"
    joined.write_text("\n".join(" ".join(document) for document in documents), encoding="utf-8")
    corpus = prepare_corpus(replace(arguments, text=(sentences,), document_separator="blank_line"))
    expected = prepare_corpus(replace(arguments, text=(joined,), output_dir=tmp_path / "expected"))
    assert corpus.manifest.counts == expected.manifest.counts
    assert pieces_of(corpus.train) == pieces_of(expected.train)
    assert (corpus.manifest.document_separator, expected.manifest.document_separator) == (
        "blank_line",
        "line",
    )


# --- the output folder -----------------------------------------------------------------------------------


def test_an_empty_output_folder_is_filled(arguments: CorpusArguments) -> None:
    arguments.output_dir.mkdir(parents=True)
    assert prepare_corpus(arguments).path == arguments.output_dir


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(
    arguments: CorpusArguments, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(writer.SplitWriter, "write", fail)
    is_stopped = isinstance(failure, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) if is_stopped else raises_user_error("unwritable-output"):
        prepare_corpus(arguments)
    assert not arguments.output_dir.parent.exists()


def test_a_tokenizer_that_writes_other_special_tokens_around_a_text_is_refused(
    small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """As one trained at home without a post-processor: plain transformers would call the student without them."""
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "TokenizersBackend"
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(saved))
    with raises_user_error("unusable-tokenizer", str(tmp_path), "[CLS]", "[SEP]"):
        load_tokenizer(str(tmp_path))
