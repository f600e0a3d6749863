"""Fixtures for all tests: devices, text from Python's documentation, a tokenizer trained on it, a corpus, teachers.

Also makes the modules in ``shared`` importable.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

# Before torch is imported: on a busy machine, threads that wait for each other must sleep. The commands set it, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus

sys.path.insert(0, str(Path(__file__).parent / "shared"))

from families import save_teacher

SMALL_VOCABULARY = 1000
SMALL_SEQ_LENGTH = 64
SMALL_TEXT_CHARACTERS = 120_000

# Tests that run in the background or under nohup ignore these signals, and so would their child processes. A handler
# that does nothing has the same effect here, but child processes do not inherit it.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# An example may take long on a busy machine.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# The tests that launch/test.sh without --full leaves out.
LEFT_FOR_FULL = pytest.StashKey[list[str]]()

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
def device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors, which selects the implementation of the losses (kernels/implementation/backend.py)."""
    return request.param


def language_reference_paragraphs() -> list[str]:
    """Return the paragraphs of the Python language reference that ``pydoc`` ships, in a fixed order."""
    paragraphs = (
        " ".join(paragraph.split()) for name in sorted(topics) for paragraph in topics[name].split("\n\n")
    )
    return [paragraph for paragraph in paragraphs if paragraph]


@pytest.fixture(scope="session")
def reference_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with one paragraph of the Python language reference per line."""
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n".join(language_reference_paragraphs()) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fast BERT tokenizer of about 1000 WordPieces, saved by ``save_pretrained``."""
    folder = tmp_path_factory.mktemp("tokenizer")
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        language_reference_paragraphs(), vocab_size=SMALL_VOCABULARY, show_progress=False
    )
    vocabulary = folder / "vocab.txt"
    pieces = sorted(trainer.get_vocab().items(), key=lambda piece_and_id: piece_and_id[1])
    vocabulary.write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")
    BertTokenizer(vocab=str(vocabulary), do_lower_case=True, model_max_length=512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_corpus_dir(tmp_path_factory: pytest.TempPathFactory, small_tokenizer_dir: Path) -> Path:
    """A prepared corpus with rows of 64 tokens: several hundred in train, a tenth of that in held_out."""
    return small_corpus(tmp_path_factory.mktemp("corpus"), small_tokenizer_dir)


def small_corpus(folder: Path, tokenizer_dir: Path) -> Path:
    text = folder / "reference.txt"
    text.write_text("\n".join(language_reference_paragraphs())[:SMALL_TEXT_CHARACTERS], encoding="utf-8")
    corpus = folder / "corpus"
    prepare_corpus(
        CorpusArguments(
            text=(text,),
            tokenizer=str(tokenizer_dir),
            seq_length=SMALL_SEQ_LENGTH,
            output_dir=corpus,
            held_out_fraction=0.1,
            num_proc=1,
        )
    )
    return corpus


class FamilyDirs(NamedTuple):
    """A tiny teacher of a family, with its tokenizer, and a corpus made with it."""

    teacher: Path
    corpus: Path


@pytest.fixture(scope="session")
def family_dirs(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer_dir: Path
) -> Callable[[str], FamilyDirs]:
    """Return a function that makes the folders of a family of ``shared/families.py``, once."""

    @cache
    def make(name: str) -> FamilyDirs:
        folder = tmp_path_factory.mktemp(name)
        save_teacher(name, language_reference_paragraphs(), small_tokenizer_dir, folder / "teacher")
        return FamilyDirs(folder / "teacher", small_corpus(folder, folder / "teacher"))

    return make


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory: pytest.TempPathFactory, small_tokenizer_dir: Path) -> Path:
    """A random BERT of 4 layers without dropout that fits the small corpus, with its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer_dir)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # large, so that its predictions differ from uniform
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dropout_teacher_dir(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path) -> Path:
    """The tiny teacher with dropout 0.1, which its student inherits."""
    folder = tmp_path_factory.mktemp("dropout") / "teacher"
    shutil.copytree(tiny_teacher_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full"):
            item.config.stash.setdefault(LEFT_FOR_FULL, []).append(item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    worker_output = getattr(session.config, "workeroutput", None)  # only a worker of pytest-xdist has it
    if worker_output is not None:
        worker_output["left_for_full"] = session.config.stash.get(LEFT_FOR_FULL, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[LEFT_FOR_FULL] = getattr(node, "workeroutput", {}).get("left_for_full", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print how many cases ``launch/test.sh --full`` would add, file by file."""
    left = Counter(name.partition("::")[0] for name in config.stash.get(LEFT_FOR_FULL, []))
    if not left:
        return
    terminalreporter.section(f"launch/test.sh --full runs {left.total()} more cases")
    for file, count in left.most_common():
        terminalreporter.write_line(f"{count:5} in {file}")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread here and in child processes: on a busy machine waiting threads make a small model 20 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> None:
    """For a second shape in a process torch.compile makes shapes dynamic, and flex attention's C++ code then fails."""
    torch.compiler.reset()
