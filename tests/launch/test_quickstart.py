"""The quickstart's text is prose without duplicate paragraphs; its tokenizer and config match."""

import json
import runpy
from pathlib import Path

from launcher import ROOT, python
from transformers import AutoTokenizer

QUICKSTART = ROOT / "launch" / "quickstart.sh"

DOCSTRING = """Return the value of the named attribute of the given object, or the default.

>>> getattr(object, "name", None)

name : str, optional
    The name of the attribute.

x = f(a[i], b[j]) * 2 ** 3 + g({"k": 1}, [0, 1, 2, 3, 4]) / h(x)[0] - 12 * 34 + 56.

The default is returned when the ``attribute`` is missing
and no error has been raised by the object itself.

Too short."""


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
