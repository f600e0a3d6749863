"""Opening a corpus, reading its rows, and loading its tokenizer."""

import json
import shutil
import string
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from user_errors import raises_user_error

from distilspeed.trainer.corpus.format import Corpus, load_tokenizer, open_corpus, read_rows, tokenizer_hash
from distilspeed.trainer.errors import UserErrorCode
from distilspeed.trainer.files import FileRecord

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TEACHER = SHARED_DATA / "teacher-minilm"
needs_teacher = pytest.mark.skipif(not TEACHER.is_dir(), reason="needs ../shared/data/teacher-minilm")

# --- reading rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("indices", [[0], [7], [5, 6, 7], [9, 2, 2, 30], np.array([3, 1])])
def test_rows_are_read_in_the_given_order(corpus: Corpus, indices: list[int]) -> None:
    rows = read_rows(corpus.train, indices)
    assert rows.input_ids.dtype == np.int64
    for position, index in enumerate(indices):
        stored = corpus.train[int(index)]
        assert rows.input_ids[position].tolist() == stored["input_ids"]
        assert rows.document_lengths[position].tolist() == stored["document_lengths"]
    assert len(rows.input_ids) == len(rows.document_lengths) == len(indices)


def test_a_row_out_of_range_is_refused(corpus: Corpus) -> None:
    with pytest.raises(IndexError):
        read_rows(corpus.train, [len(corpus.train)])


# --- tokenizers -----------------------------------------------------------------------------------------


def check_hash_survives_saving_and_use(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    expected = tokenizer_hash(tokenizer)
    tokenizer(["a", "a longer text"], truncation=True, max_length=5, padding="max_length")
    assert tokenizer_hash(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "copy"))) == expected
    tokenizer.add_tokens(["distilspeed"])
    assert tokenizer_hash(tokenizer) != expected


def test_a_tokenizers_hash_survives_saving_and_use(small_tokenizer_dir: Path, tmp_path: Path) -> None:
    check_hash_survives_saving_and_use(small_tokenizer_dir, tmp_path)


@needs_teacher
def test_a_teachers_tokenizer_hash_survives_saving_and_use(tmp_path: Path) -> None:
    check_hash_survives_saving_and_use(TEACHER, tmp_path)


def test_a_corpus_contains_its_tokenizer(corpus: Corpus, small_tokenizer_dir: Path) -> None:
    teacher_hash = tokenizer_hash(load_tokenizer(str(small_tokenizer_dir)))
    assert tokenizer_hash(corpus.load_tokenizer()) == corpus.manifest.tokenizer_hash == teacher_hash


def bert_folder(folder: Path, pieces: list[str], **config: bool) -> str:
    """Write a folder with ``vocab.txt`` and ``config.json``, like BioBERT's; ``config`` adds tokenizer_config.json."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[unused1]", *pieces]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_tokenizer_that_lower_cases_text_for_a_cased_vocabulary_is_refused(tmp_path: Path) -> None:
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    cased = [*letters, "York", "A", "##A"]
    with raises_user_error("unusable-tokenizer", "biobert", "3", "55", '"do_lower_case": false'):
        load_tokenizer(bert_folder(tmp_path / "biobert", cased))
    corrected = load_tokenizer(bert_folder(tmp_path / "corrected", cased, do_lower_case=False))
    assert corrected.tokenize("York") == ["York"]
    # A lower-cased vocabulary may have one or two capitals, and letters without case.
    uncased = load_tokenizer(bert_folder(tmp_path / "uncased", [*letters, "Ⅳ", "##Ω", "中", "1"]))
    assert uncased.tokenize("Abc") == ["a", "##b", "##c"]


def test_verifying_a_corpus_refuses_a_tokenizer_that_lower_cases_a_cased_vocabulary(
    copied_corpus_dir: Path,
) -> None:
    tokenizer = copied_corpus_dir / "tokenizer" / "tokenizer.json"
    pipeline = json.loads(tokenizer.read_text())
    vocabulary = pipeline["model"]["vocab"]
    pipeline["model"]["vocab"] = {
        piece.title() if piece.startswith("s") else piece: number for piece, number in vocabulary.items()
    }
    tokenizer.write_text(json.dumps(pipeline))
    manifest = json.loads((copied_corpus_dir / "manifest.json").read_text())
    for record in manifest["files"]:
        record |= asdict(FileRecord.of(copied_corpus_dir, copied_corpus_dir / record["path"]))
    (copied_corpus_dir / "manifest.json").write_text(json.dumps(manifest))
    open_corpus(copied_corpus_dir)
    with raises_user_error("unusable-tokenizer", '"do_lower_case": false'):
        open_corpus(copied_corpus_dir, verify_checksums=True)


# --- opening --------------------------------------------------------------------------------------------


@pytest.fixture
def copied_corpus_dir(small_corpus_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_corpus_dir, tmp_path / "copied"))


def test_a_corpus_can_be_moved(copied_corpus_dir: Path, corpus: Corpus) -> None:
    moved = open_corpus(copied_corpus_dir, verify_checksums=True)
    assert moved.manifest == corpus.manifest
    assert moved.train[3] == corpus.train[3]


def test_a_folder_that_is_not_a_corpus_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with raises_user_error("not-a-corpus", str(folder)):
            open_corpus(folder)


@pytest.mark.parametrize(
    ("manifest", "code", "named"),
    [
        ('{"format_version": 99}', "unsupported-format", "format 99"),
        ("{}", "unsupported-format", "format None"),
        ('{"format_version": 1}', "damaged-corpus", "manifest.json"),
        ("[]", "damaged-corpus", "manifest.json"),
        ('{"format', "damaged-corpus", "manifest.json"),
    ],
)
def test_a_manifest_that_is_damaged_or_of_another_format_is_refused(
    copied_corpus_dir: Path, manifest: str, code: UserErrorCode, named: str
) -> None:
    (copied_corpus_dir / "manifest.json").write_text(manifest)
    with raises_user_error(code, str(copied_corpus_dir), named):
        open_corpus(copied_corpus_dir)


def test_damage_to_any_file_is_found(copied_corpus_dir: Path) -> None:
    files = [path for path in copied_corpus_dir.rglob("*") if path.is_file() and path.name != "manifest.json"]
    for path in files:
        content, name = path.read_bytes(), path.relative_to(copied_corpus_dir).as_posix()
        path.unlink()
        with raises_user_error("damaged-corpus", name):
            open_corpus(copied_corpus_dir)
        path.write_bytes(content[:-1])
        with raises_user_error("damaged-corpus", name, str(len(content) - 1), str(len(content))):
            open_corpus(copied_corpus_dir)
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with raises_user_error("damaged-corpus", name):
            open_corpus(copied_corpus_dir, verify_checksums=True)
        path.write_bytes(content)
    open_corpus(copied_corpus_dir, verify_checksums=True)


def test_damage_that_keeps_the_file_size_is_a_user_error(copied_corpus_dir: Path) -> None:
    path = copied_corpus_dir / "train" / "data.arrow"
    path.write_bytes(b"\0" * path.stat().st_size)
    with raises_user_error("damaged-corpus", str(copied_corpus_dir)):
        open_corpus(copied_corpus_dir)
