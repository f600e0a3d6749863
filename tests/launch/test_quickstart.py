"""The quickstart's inputs: the model and books that are shipped, and the text, tokenizer and config from scratch."""

import json
import lzma
import runpy
from pathlib import Path

import torch
from launcher import ROOT, python
from transformers import AutoModelForMaskedLM, AutoTokenizer

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.evaluation.quality import held_out_quality

QUICKSTART = ROOT / "launch" / "quickstart"
PARAGRAPHS, ACCURACY = 600, 0.33  # of the held-out books

DOCSTRING = """Return the value of the named attribute of the given object, or the default.

>>> getattr(object, "name", None)

name : str, optional
    The name of the attribute.

x = f(a[i], b[j]) * 2 ** 3 + g({"k": 1}, [0, 1, 2, 3, 4]) / h(x)[0] - 12 * 34 + 56.

The default is returned when the ``attribute`` is missing
and no error has been raised by the object itself.

Too short."""


def paragraphs(name: str) -> list[str]:
    with lzma.open(QUICKSTART / f"{name}.txt.xz", "rt", encoding="utf-8") as lines:
        return list(lines)


def test_only_a_docstrings_paragraphs_of_prose_are_kept() -> None:
    prose = runpy.run_path(str(ROOT / "launch" / "quickstart_data.py"))["prose_paragraphs"]
    assert list(prose(DOCSTRING)) == [
        "Return the value of the named attribute of the given object, or the default.",
        "The default is returned when the attribute is missing and no error has been raised by the object itself.",
    ]


def test_text_tokenizer_and_config_match(tmp_path: Path) -> None:
    result = python(ROOT / "launch" / "quickstart_data.py", "--output_dir", tmp_path / "data")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "data" / "text.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) > 10_000
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer")
    config = json.loads((tmp_path / "data" / "teacher_config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert tokenizer.decode(tokenizer(lines[0])["input_ids"], skip_special_tokens=True)


def test_the_shipped_teacher_predicts_books_that_it_has_not_seen(tmp_path: Path) -> None:
    weights = QUICKSTART / "teacher" / "model.safetensors"
    assert weights.stat().st_size <= 21e6
    (tmp_path / "books.txt").write_text("".join(paragraphs("held_out_books")[:PARAGRAPHS]), encoding="utf-8")
    options = {
        "--text": tmp_path / "books.txt",
        "--tokenizer": QUICKSTART / "teacher",
        "--seq_length": 128,
        "--held_out_fraction": 0.4,
        "--output_dir": tmp_path / "corpus",
    }
    done = python(
        ROOT / "launch" / "prepare_data.py", *(part for option in options.items() for part in option)
    )
    assert done.returncode == 0, done.stderr
    corpus = open_corpus(tmp_path / "corpus")
    assert corpus.manifest.counts.dropped_unknown == 0
    model = AutoModelForMaskedLM.from_pretrained(QUICKSTART / "teacher", dtype="auto")
    assert model.dtype == torch.float16
    quality = held_out_quality(model.float(), corpus, max_rows=200)
    assert quality.accuracy > ACCURACY


def test_the_two_sets_of_books_have_no_paragraph_in_common() -> None:
    train, held_out = set(paragraphs("books")), set(paragraphs("held_out_books"))
    assert min(len(train), len(held_out)) > 2000
    assert not {line for line in train & held_out if len(line) > 100}


def test_a_model_with_a_smaller_vocabulary_has_the_logits_of_the_pieces_that_it_keeps(
    tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the value of the list\nreturn the value é\n", encoding="utf-8")
    command = QUICKSTART / "cut_vocabulary.py"
    options = (
        "--model",
        tiny_teacher_dir,
        "--text",
        text,
        "--vocab_size",
        60,
        "--output_dir",
        tmp_path / "small",
    )
    done = python(command, *options)
    assert done.returncode == 0, done.stderr
    whole, small = (
        (AutoModelForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        for folder in (tiny_teacher_dir, tmp_path / "small")
    )
    pieces = small[1].get_vocab()
    assert len(pieces) <= 60
    assert {"[MASK]", "[UNK]", "the", "value", "v", "##v"} <= pieces.keys()
    inputs = "the value of"
    assert small[1].tokenize(inputs) == whole[1].tokenize(inputs)
    rows = whole[1].convert_tokens_to_ids(list(pieces))
    with torch.no_grad():
        logits, expected = (
            model(**tokenizer(inputs, return_tensors="pt")).logits for model, tokenizer in (small, whole)
        )
    torch.testing.assert_close(logits[..., list(pieces.values())], expected[..., rows])
    assert "[UNK]" not in small[1].tokenize("leaf of the value")  # in smaller pieces
