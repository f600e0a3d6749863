"""Bad input to every command but launch/train.py: status 2, one line that names it, nothing created or changed.

Each case is a command line, given in a folder of malformed files (:func:`inputs`), and a part of the line it gets.
"""

import fcntl
import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from launcher import CPU_CONFIG, ROOT
from refusals import refusal, snapshot
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
)

from distilspeed.trainer.corpus import Shard
from distilspeed.trainer.corpus_writer import RowWriter
from distilspeed.trainer.preparation import CorpusArguments, prepare_corpus
from distilspeed.trainer.sources import LONGEST_LINE, READ_BYTES
from distilspeed.trainer.student import load_teacher, make_student

# --- the malformed files --------------------------------------------------------------------------------

LONG_NAME = "n" * 300
SENTENCE = "this is a sentence of more than twelve tokens, so that it is a piece of its own"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory,
    reference_text: Path,
    small_tokenizer_dir: Path,
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copy(reference_text, folder / "good.txt")
    for source, name in (
        (small_tokenizer_dir, "tokenizer"),
        (tiny_teacher_dir, "teacher"),
        (small_corpus_dir, "corpus"),
    ):
        shutil.copytree(source, folder / name)
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "link_to_void").symlink_to("void")
    (folder / "void").mkdir()
    (folder / "occupied").mkdir()
    (folder / "occupied" / "notes.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    _write_texts(folder)
    _write_datasets(folder)
    _write_tokenizers(folder)
    _write_corpora(folder)
    _write_models(folder)
    _write_tasks(folder)
    _write_configs(folder)
    _write_scripts(folder)
    return folder


def _write_texts(folder: Path) -> None:
    text = f"{SENTENCE}\n".encode()
    contents = {
        "latin1.txt": "Stra\xdfe\n".encode("latin-1"),
        "utf16.txt": SENTENCE.encode("utf-16"),
        "utf16_without_mark.txt": SENTENCE.encode("utf-16-le"),
        "cut.txt": text + "€".encode()[:2],
        "far.txt": text * 40_000 + b"\xff\n" + text,
        "nul.txt": text + b"\0\n",
        "program.bin": Path(sys.executable).read_bytes()[:5000],
        "packed.txt.gz": gzip.compress(text * 100),
        "packed.jsonl.zst": b"\x28\xb5\x2f\xfd" + bytes(range(256)),
        "endless.txt": b"a" * (LONGEST_LINE + 2 * READ_BYTES),
        "endless.jsonl": b'{"text": "' + b"a" * (LONGEST_LINE + 2 * READ_BYTES) + b'"}\n',
        "empty.txt": b"",
        "mark.txt": b"\xef\xbb\xbf",
        "blank.txt": "\n \t\u2003\r\n\u3000\n".encode(),
        "words.txt": b"word\n\nanother\n" * 1000,
        "few.txt": text,
        "unknown.txt": "\u16a0\u16a1 ".encode() * 1000,
        "latin1.jsonl": b'{"text": "Stra\xdfe"}\n',
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "other.jsonl": b'{"text": "a"}\n{"body": "a"}\n',
        "number.jsonl": b'{"text": 3}\n',
        "string.jsonl": b'"text"\n',
        "deep.jsonl": b"[" * 100_000 + b"\n",
        "deep.json": b"[" * 100_000,
        "digits.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
        "cut.json": b'[{"text": "a"}',
        "objects.json": b'[["a"]]',
        "array.json": b"[]",
        # A shard of an array reads all of it.
        "latin1.json": b'[{"text": "a"},\n{"text": "b"},\n{"text": "c"},\n{"text": "Stra\xdfe"}]',
        "broken.parquet": b"PAR1",
        "config.json": b"{}",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    records = pa.table({"text": [SENTENCE] * 100, "number": range(100)})
    pyarrow.parquet.write_table(records, folder / "good.parquet")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.parquet").write_bytes(whole.replace(b"sentence", b"\xff" * 8))


def _write_datasets(folder: Path) -> None:
    records = datasets.Dataset.from_dict({"body": [SENTENCE]})
    records.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict(train=records).save_to_disk(str(folder / "splits"))
    shutil.copytree(folder / "saved", folder / "saved_broken")
    (folder / "saved_broken" / "state.json").write_text("{")
    shutil.copytree(folder / "saved", folder / "saved_cut")
    for file in (folder / "saved_cut").glob("*.arrow"):
        os.truncate(file, 100)
    for name, file, content in (
        ("scripted", "scripted.py", "open('executed', 'w')"),
        ("pickled", "train.pkl", "cos\nsystem\n(S'touch executed'\ntR."),
        ("data", "train.jsonl", '{"text": "a"}'),
        ("data_broken", "train.jsonl", '{"text": "a"}\n{'),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(f"{content}\n")


def _write_tokenizers(folder: Path) -> None:
    good = folder / "tokenizer"
    ByT5Tokenizer().save_pretrained(folder / "slow_tokenizer")
    limitless = AutoTokenizer.from_pretrained(good, model_max_length=10**30)
    limitless.save_pretrained(folder / "limitless_tokenizer")
    for name, token in (("no_mask", "mask_token"), ("no_pad", "pad_token")):
        tokenizer = AutoTokenizer.from_pretrained(good)
        setattr(tokenizer, token, None)
        tokenizer.save_pretrained(folder / name)
    for name, content in (
        ("tokenizer_not_json", b"tokenizer"),
        ("tokenizer_empty", b"{}"),
        ("tokenizer_latin1", b"\xff"),
        ("tokenizer_cut", (good / "tokenizer.json").read_bytes()[:5000]),
    ):
        shutil.copytree(good, folder / name)
        (folder / name / "tokenizer.json").write_bytes(content)
        (folder / name / "vocab.txt").unlink(missing_ok=True)


def _write_corpora(folder: Path) -> None:
    def prepare(name: str, shard: Shard, **changes: Any) -> None:
        arguments = {"text": (folder / "good.txt",), "seq_length": 64, "held_out_fraction": 0.1, **changes}
        tokenizer = str(folder / "tokenizer")
        prepare_corpus(CorpusArguments(tokenizer, folder / name, num_proc=1, shard=shard, **arguments))

    prepare("shard0", Shard(0, 2))
    prepare("shard1", Shard(1, 2))
    prepare("shard1_of_3", Shard(1, 3))
    prepare("shard1_shorter", Shard(1, 2), seq_length=32)
    shutil.copytree(folder / "shard0", folder / "shard0_again")
    shutil.copytree(folder / "shard1", folder / "shard1_damaged")
    _flip_a_byte(folder / "shard1_damaged" / "train" / "data.arrow")
    for name, file, size in (
        ("corpus_cut", "train/data.arrow", 1000),
        ("corpus_no_manifest", "manifest.json", 50),
    ):
        shutil.copytree(folder / "corpus", folder / name)
        os.truncate(folder / name / file, size)
    shutil.copytree(folder / "corpus", folder / "corpus_without_counts")
    (folder / "corpus_without_counts" / "token_counts.npy").unlink()


def _flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _write_models(folder: Path) -> None:
    teacher = load_teacher(str(folder / "teacher"))
    make_student(teacher, (0, 3)).save_pretrained(folder / "student")
    vocab_size = teacher.config.vocab_size
    BertForMaskedLM(BertConfig(vocab_size=vocab_size, **TINY)).bert.save_pretrained(folder / "headless")
    BertForMaskedLM(BertConfig(vocab_size=500, **TINY)).save_pretrained(folder / "small_vocabulary")
    BertForMaskedLM(
        BertConfig(vocab_size=vocab_size, **TINY | {"max_position_embeddings": 32})
    ).save_pretrained(folder / "short")
    RobertaForMaskedLM(RobertaConfig(vocab_size=vocab_size, **TINY)).save_pretrained(folder / "roberta")
    for name in (
        "pickled_weights",
        "cut_weights",
        "nan_weights",
        "no_config",
        "config_not_json",
        "other_tokenizer",
    ):
        shutil.copytree(folder / "teacher", folder / name)
    weights = folder / "pickled_weights" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    os.truncate(folder / "cut_weights" / "model.safetensors", 5000)
    weights = folder / "nan_weights" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    (folder / "no_config" / "config.json").unlink()
    (folder / "config_not_json" / "config.json").write_text("{")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    tokenizer.add_tokens("another")
    tokenizer.save_pretrained(folder / "other_tokenizer")


def _write_tasks(folder: Path) -> None:
    good = [{"text": f"the list {number}", "label": number % 2} for number in range(8)]
    changed: dict[str, Any] = {
        "good": {},
        "no_label": {"label": None},
        "label_list": {"label": [1]},
        "label_fraction": {"label": 0.5},
        "text_number": {"text": 1},
        "one_class": {"label": 1},
    }
    for name, change in changed.items():
        _write_task(folder / "tasks" / name, "".join(json.dumps(record | change) + "\n" for record in good))
    lines = "".join(json.dumps(record) + "\n" for record in good)
    for name, dev in (
        ("new_class", '{"text": "a", "label": 7}\n'),
        ("mixed", '{"text_a": "a", "text_b": "b", "label": 1}\n'),
        ("empty_dev", ""),
        ("not_json", "{\n"),
        ("deep", "[" * 100_000 + "\n"),
        ("array", "[1]\n"),
        ("no_dev", None),
    ):
        _write_task(folder / "tasks" / name, lines, dev)
    _write_task(folder / "tasks" / "latin1", lines)
    (folder / "tasks" / "latin1" / "dev.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 0}\n')
    _write_task(folder / "more" / "good", lines)


def _write_task(folder: Path, train: str, dev: str | None = "as train") -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(train)
    if dev is not None:
        (folder / "dev.jsonl").write_text(train if dev == "as train" else dev)


def _write_configs(folder: Path) -> None:
    good = json.loads(CPU_CONFIG.read_text())
    (folder / "good_config.json").write_text(json.dumps(good))
    (folder / "fp16_and_bf16.json").write_text(
        json.dumps(good | {"fp16": {"enabled": True}, "bf16": {"enabled": True}})
    )
    (folder / "not_json.json").write_text("{")
    (folder / "result.json").write_text("{}")


def _write_scripts(folder: Path) -> None:
    """A checkout without .venv, and hostfiles."""
    (folder / "checkout").mkdir()
    shutil.copytree(
        ROOT / "launch", folder / "checkout" / "launch", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "setup.py", folder / "checkout")
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text("#!/bin/sh\n")
    (folder / "bin" / "scontrol").chmod(0o755)
    for name, content in (
        ("hosts_empty", b"# none\n\n"),
        ("hosts_without_slots", b"host1\n"),
        ("hosts_zero", b"host1 slots=0\n"),
        ("hosts_word", b"host1 slots=two\n"),
        ("hosts_twice", b"host1 slots=1\nhost1 slots=1\n"),
        ("hosts_windows", b"host1 slots=1\r\nhost2 slots=1\r\n"),
        ("hosts_option", b"-oProxyCommand=touch\x20executed slots=1\n"),
        ("hosts_quote", b'ho"st slots=1\n'),
        ("hosts_binary", bytes(range(1, 256))),
        ("hosts", b"host1 slots=1\n"),
    ):
        (folder / name).write_bytes(content)


@pytest.fixture(autouse=True)
def _as_a_command(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder, without network; signal handlers as they were."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def check(
    script: str,
    arguments: str,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = refusal(script, [*shlex.split(arguments)], folder, monkeypatch, capfd)
    assert said in line
    assert "; " in line or " must be " in line, "it does not say what to do"


# --- prepare_data.py ------------------------------------------------------------------------------------

PREPARE_TEXT = [
    ("latin1.txt", "latin1.txt is not UTF-8 at byte 4; convert it"),
    ("utf16.txt", "utf16.txt is not UTF-8 at byte 0;"),
    ("utf16_without_mark.txt", "utf16_without_mark.txt is binary or UTF-16: byte 1 is 0;"),
    ("cut.txt", f"cut.txt is not UTF-8 at byte {len(SENTENCE) + 1};"),
    ("far.txt", f"far.txt is not UTF-8 at byte {40_000 * (len(SENTENCE) + 1)};"),
    ("nul.txt", f"nul.txt is binary or UTF-16: byte {len(SENTENCE) + 1} is 0;"),
    ("program.bin", "program.bin is "),
    ("packed.txt.gz", "packed.txt.gz is not UTF-8 at byte 1;"),
    ("packed.jsonl.zst", "packed.jsonl.zst is not UTF-8 at byte 1;"),
    ("endless.txt", "endless.txt has a line of more than 64 MiB"),
    ("endless.jsonl", "endless.jsonl has a line of more than 64 MiB"),
    ("''", "there is no text file .;"),
    ("empty.txt", "empty.txt is empty"),
    ("mark.txt", "mark.txt holds no text"),
    ("blank.txt", "blank.txt holds no text"),
    ("words.txt", "the text fills 0 row(s) of 64 tokens"),
    ("unknown.txt", "the text fills 0 row(s) of 64 tokens"),
    ("few.txt", "the text fills 1 row(s) of 64 tokens, too few for training and held-out rows"),
    ("good.txt empty.txt", "empty.txt is empty"),
    ("good.txt blank.txt", "blank.txt holds no text"),
    ("occupied", "there is no text file occupied; check --text (a folder goes with --dataset)"),
    ("nowhere.txt", "there is no text file nowhere.txt;"),
    ("good.txt/part", "there is no text file good.txt/part;"),
    ("loop", "there is no text file loop;"),
    ("dangling", "there is no text file dangling;"),
    (LONG_NAME, "File name too long; check --text"),
    ("pipe", "there is no text file pipe;"),
    ("latin1.jsonl", "latin1.jsonl is not UTF-8 at byte 14;"),
    ("broken.jsonl", "broken.jsonl, line 2 is not JSON"),
    ("other.jsonl", "line 2 has no field 'text' but body;"),
    ("number.jsonl", "number.jsonl holds int where text is expected"),
    ("string.jsonl", "string.jsonl, line 1 is not an object"),
    ("deep.jsonl", "deep.jsonl is not JSON"),
    ("deep.json", "deep.json is not JSON"),
    ("digits.jsonl", "digits.jsonl, line 1 is not JSON"),
    ("cut.json", "cut.json is not JSON"),
    ("objects.json", "objects.json, record 1 is not an object"),
    ("array.json", "array.json holds no text"),
    ("latin1.json --shard 0/2", "latin1.json is not UTF-8 at byte"),
    ("latin1.json --shard 1/2", "latin1.json is not UTF-8 at byte"),
    ("broken.parquet", "broken.parquet cannot be read"),
    ("cut.parquet", "cut.parquet cannot be read"),
    ("damaged.parquet", "damaged.parquet cannot be read"),
    ("good.parquet --text_column body", "has no field 'body' but text, number"),
    ("good.parquet --text_column number", "good.parquet holds int where text is expected"),
]
PREPARE_DATASET = [
    ("nobody/nothing", "the dataset nobody/nothing cannot be read"),
    ("''", "names no dataset"),
    (":config", "names no dataset"),
    ("a:b:c:d", "not NAME[:CONFIG[:SPLIT]]"),
    ("json", "the dataset json cannot be read"),
    ("void", "the dataset void cannot be read"),
    ("good.txt", "good.txt is a file; give it as --text"),
    ("loop", "the dataset loop cannot be read"),
    (LONG_NAME, "File name too long; check --text and --dataset"),
    ("saved", "has no field 'text' but body"),
    ("saved::test --text_column body", "without splits"),
    ("splits::test --text_column body", "splits::test cannot be read"),
    ("saved_broken", "saved_broken cannot be read"),
    ("saved_cut --text_column body", "saved_cut cannot be read"),
    ("scripted", "scripted cannot be read"),
    ("pickled", "pickled cannot be read"),
    ("data::test", "data::test cannot be read"),
    ("data_broken", "data_broken cannot be read"),
]
PREPARE = [
    *((f"--text {text}", said) for text, said in PREPARE_TEXT),
    *((f"--dataset {name}", said) for name, said in PREPARE_DATASET),
    ("", "give --text or --dataset"),
    ("--texts good.txt", "unrecognized arguments: --texts"),
]
PREPARE_GOOD_TEXT = [
    ("--tokenizer nowhere", "the tokenizer nowhere cannot be loaded"),
    ("--tokenizer ''", "the tokenizer"),
    ("--tokenizer void", "the tokenizer void cannot be loaded"),
    ("--tokenizer good.txt", "the tokenizer good.txt cannot be loaded"),
    ("--tokenizer no_mask", "the tokenizer no_mask has no mask token"),
    ("--tokenizer no_pad", "the tokenizer no_pad has no pad token"),
    ("--tokenizer slow_tokenizer", "slow_tokenizer has no fast tokenizer"),
    ("--tokenizer tokenizer_not_json", "the tokenizer tokenizer_not_json cannot be loaded"),
    ("--tokenizer tokenizer_empty", "the tokenizer tokenizer_empty cannot be loaded"),
    ("--tokenizer tokenizer_latin1", "the tokenizer tokenizer_latin1 cannot be loaded"),
    ("--tokenizer tokenizer_cut", "the tokenizer tokenizer_cut cannot be loaded"),
    ("--seq_length 0", "--seq_length 0 is not between 16 and the tokenizer's limit of 512"),
    ("--seq_length -64", "--seq_length -64 is not between 16"),
    ("--seq_length 15", "--seq_length 15 is not between 16"),
    ("--seq_length 513", "--seq_length 513 is not between 16"),
    ("--seq_length 1000000000 --tokenizer limitless_tokenizer", "--seq_length 1000000000 is not between 16"),
    ("--seq_length long", "argument --seq_length: invalid int value: 'long'"),
    ("--seq_length 64.5", "argument --seq_length: invalid int value: '64.5'"),
    ("--held_out_fraction 0", "--held_out_fraction 0.0 is not between"),
    ("--held_out_fraction 0.5", "--held_out_fraction 0.5 is not between"),
    ("--held_out_fraction -0.1", "--held_out_fraction -0.1 is not between"),
    ("--held_out_fraction nan", "--held_out_fraction nan is not between"),
    ("--held_out_fraction half", "argument --held_out_fraction: invalid float value"),
    ("--num_proc 0", "--num_proc 0 is below 1"),
    ("--num_proc -2", "--num_proc -2 is below 1"),
    ("--num_proc all", "argument --num_proc: invalid int value: 'all'"),
    ("--shard /", "--shard '/' is not I/N"),
    ("--shard 1", "--shard '1' is not I/N"),
    ("--shard 1/2/3", "--shard '1/2/3' is not I/N"),
    ("--shard a/b", "--shard 'a/b' is not I/N"),
    ("--shard=-1/4", "--shard '-1/4' is not I/N"),
    ("--shard 4/4", "there is no shard 4/4"),
    ("--shard 1/0", "there is no shard 1/0"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir good.txt", "good.txt exists already"),
    ("--output_dir occupied/notes.txt/corpus", "cannot write occupied/notes.txt/corpus"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir dangling", "dangling exists already"),
    ("--output_dir link_to_void", "link_to_void exists already"),
    ("--output_dir loop/corpus", "loop/corpus cannot be made: Too many levels of symbolic links"),
    (f"--output_dir {LONG_NAME}", "File name too long"),
    ("--dataset data --output_dir data", "data exists already"),
    ("--dataset data --output_dir data/corpus", "data/corpus is inside the dataset data"),
    ("--dataset .::train --output_dir out/corpus", "out/corpus is inside the dataset .::train"),
    ("--merge shard0 shard1", "--merge takes --output_dir and nothing else"),
]
MERGE = [
    ("shard0", "shard 1/2 is missing"),
    ("shard0 shard0", "are both shard 0/2"),
    ("shard0 shard0_again", "are both shard 0/2"),
    ("shard0 shard1_of_3", "one of 2 shards and shard1_of_3 one of 3"),
    ("shard0 shard1_shorter", "differ in seq_length: 64 and 32"),
    ("shard0 shard1_damaged", "the content of train/data.arrow has changed"),
    ("corpus", "corpus is no shard but a whole corpus"),
    ("shard0 nowhere", "nowhere is not a prepared corpus"),
    ("shard0 good.txt", "good.txt is not a prepared corpus"),
    ("shard0 loop", "loop"),
    ("shard0 shard1 --output_dir shard1", "shard1 exists already"),
    ("shard0 shard1 --output_dir loop", "loop exists already"),
    ("shard0 shard1 --output_dir good.txt/corpus", "cannot write good.txt/corpus"),
    ("", "argument --merge: expected at least one argument"),
]


@pytest.mark.parametrize(("arguments", "said"), PREPARE)
def test_prepare_data_refuses_text(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = "--tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus"
    check("prepare_data.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)


@pytest.mark.parametrize(("arguments", "said"), PREPARE_GOOD_TEXT)
def test_prepare_data_refuses_options(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = "--text good.txt --tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir out/corpus"
    check("prepare_data.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)


@pytest.mark.parametrize(("arguments", "said"), MERGE)
def test_prepare_data_refuses_shards(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check("prepare_data.py", f"--output_dir out/corpus --merge {arguments}", said, inputs, monkeypatch, capfd)


@pytest.fixture
def interrupted(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a build of half/corpus that Ctrl-C ended after its first rows; goes after the test."""
    with monkeypatch.context() as patch:
        patch.setattr("distilspeed.trainer.workers.BATCH_CHARACTERS", 20_000)
        patch.setattr("distilspeed.trainer.unfinished.SECONDS_BETWEEN_RECORDS", 0.0)
        add, batches = RowWriter.add, itertools.count()

        def interrupt(writer: RowWriter, batch: Any) -> None:
            add(writer, batch)
            if next(batches):
                raise KeyboardInterrupt

        patch.setattr(RowWriter, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(
                CorpusArguments(
                    "tokenizer", Path("half/corpus"), (Path("good.txt"),), seq_length=64, num_proc=1
                )
            )
    yield inputs / "half" / "corpus.incomplete"
    shutil.rmtree(inputs / "half")


@pytest.mark.parametrize(
    ("damage", "arguments", "said"),
    [
        ("", "", "half/corpus.incomplete holds an unfinished build; go on with --resume"),
        ("", "--resume --seq_length 32", "was begun with seq_length 64, not 32"),
        ("", "--resume --text few.txt", "was begun with sources"),
        (
            "",
            "--resume --tokenizer limitless_tokenizer --held_out_fraction 0.2",
            "was begun with held_out_fraction",
        ),
        ("progress.json: {", "--resume", "half/corpus.incomplete cannot be gone on with"),
        ("progress.json: []", "--resume", "half/corpus.incomplete cannot be gone on with"),
        ("progress.json: \xff", "--resume", "half/corpus.incomplete cannot be gone on with"),
        ('progress.json: {"recipe": {}}', "--resume", "half/corpus.incomplete cannot be gone on with"),
        ("train/data.arrow: ", "--resume", "half/corpus.incomplete is damaged: its rows are cut short"),
        ("locked", "--resume", "another process is preparing half/corpus"),
    ],
)
def test_prepare_data_refuses_to_go_on(
    damage: str,
    arguments: str,
    said: str,
    inputs: Path,
    interrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lock = os.open(interrupted, os.O_RDONLY)
    if damage == "locked":
        fcntl.flock(lock, fcntl.LOCK_EX)
    elif damage:
        name, content = damage.split(": ", maxsplit=1)
        (interrupted / name).write_bytes(content.encode("latin-1"))
    options = "--text good.txt --tokenizer tokenizer --seq_length 64 --num_proc 1 --output_dir half/corpus"
    check("prepare_data.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)
    os.close(lock)


# --- evaluate.py ----------------------------------------------------------------------------------------

EVALUATE = [
    ("--teacher nowhere", "cannot load the teacher nowhere"),
    ("--student nobody/nothing", "cannot load the student nobody/nothing"),
    ("--baseline void", "cannot load the baseline void"),
    ("--student good.txt", "cannot load the student good.txt"),
    ("--student loop", "cannot load the student loop"),
    ("--student headless", "the student headless lacks weights"),
    ("--student small_vocabulary", "the student small_vocabulary has a vocabulary of 500 tokens"),
    ("--student short", "the student short only 32 positions"),
    ("--teacher roberta", 'the teacher roberta is a "roberta" model'),
    ("--student pickled_weights", "cannot load the student pickled_weights"),
    ("--student pickled_weights", "save_pretrained writes"),
    ("--student cut_weights", "cannot load the student cut_weights"),
    ("--student nan_weights", "the student nan_weights has NaN"),
    ("--student no_config", "cannot load the student no_config"),
    ("--student config_not_json", "cannot load the student config_not_json"),
    ("--student other_tokenizer", "another tokenizer than that of the student other_tokenizer"),
    ("--data_dir nowhere", "nowhere is not a prepared corpus"),
    ("--data_dir void", "void is not a prepared corpus"),
    ("--data_dir good.txt", "good.txt is not a prepared corpus"),
    ("--data_dir corpus_cut", "the corpus corpus_cut is damaged: train/data.arrow has 1000 bytes"),
    ("--data_dir corpus_no_manifest", "the corpus corpus_no_manifest is damaged: manifest.json"),
    ("--data_dir corpus_without_counts", "token_counts.npy is missing"),
    ("--task nowhere", "cannot read nowhere/train.jsonl"),
    ("--task loop", "cannot read loop/train.jsonl"),
    ("--task good.txt", "cannot read good.txt/train.jsonl"),
    ("--task tasks/no_dev", "cannot read tasks/no_dev/dev.jsonl"),
    ("--task tasks/no_label", 'tasks/no_label/train.jsonl, line 1 needs "text"'),
    ("--task tasks/label_list", 'tasks/label_list/train.jsonl, line 1 needs "text"'),
    ("--task tasks/label_fraction", 'tasks/label_fraction/train.jsonl, line 1 needs "text"'),
    ("--task tasks/text_number", 'tasks/text_number/train.jsonl, line 1 needs "text"'),
    ("--task tasks/one_class", "task tasks/one_class have the label 1"),
    ("--task tasks/new_class", "dev.jsonl of the task tasks/new_class has labels that train.jsonl lacks (7)"),
    ("--task tasks/mixed", "tasks/mixed mixes"),
    ("--task tasks/empty_dev", "tasks/empty_dev/dev.jsonl is empty"),
    ("--task tasks/not_json", "tasks/not_json/dev.jsonl, line 1 is not JSON"),
    ("--task tasks/deep", "tasks/deep/dev.jsonl, line 1 is not JSON"),
    ("--task tasks/array", "tasks/array/dev.jsonl, line 1 is not an object"),
    ("--task tasks/latin1", "tasks/latin1/dev.jsonl is not UTF-8"),
    ("--task tasks/good --task more/good", "two --task folders have the same name"),
    ("--max_rows 0", "--max_rows must be at least 1"),
    ("--max_rows many", "argument --max_rows: invalid int value: 'many'"),
    ("--task_epochs 0", "--task_epochs must be at least 1"),
    ("--task_seeds -1", "--task_seeds must be at least 1"),
    ("--task_batch_size 0", "--task_batch_size must be at least 1"),
    ("--task_learning_rate nan", "--task_learning_rate must be between 0 and 1"),
    ("--task_learning_rate 0", "--task_learning_rate must be between 0 and 1"),
    ("--seed -1", "--seed must be from 0"),
    ("--seed 4294967296", "--seed must be from 0"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir good.txt", "good.txt exists already"),
    ("--output_dir corpus", "corpus exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir link_to_void", "link_to_void exists already"),
    ("--output_dir good.txt/evaluation", "good.txt/evaluation cannot be made"),
]


@pytest.mark.parametrize(("arguments", "said"), EVALUATE)
def test_evaluate_refuses(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = "--teacher teacher --student student --data_dir corpus --output_dir out/evaluation --device cpu"
    check("evaluate.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)


# --- profile_kernels.py, benchmark.py, benchmark_preparation.py, quickstart_data.py -----------------------

PROFILE = [
    ("--tokens 0", "--tokens must be at least 1"),
    ("--tokens -4", "--tokens must be at least 1"),
    ("--tokens 1e3", "argument --tokens: invalid int value: '1e3'"),
    ("--tokens 1000000000", "use fewer --tokens"),
    ("--vocab_size 0", "--vocab_size must be at least 1"),
    ("--hidden_size 0", "--hidden_size must be at least 1"),
    ("--repeats 0", "--repeats must be at least 1"),
    ("--temperature 0", "--temperature must be a positive number"),
    ("--temperature nan", "--temperature must be a positive number"),
    ("--temperature inf", "--temperature must be a positive number"),
    ("--dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--peers apex", "--peers must be of compile, eager, liger, or none"),
    ("--peers ''", "--peers must be of compile, eager, liger, or none"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir good.txt/profile", "cannot write good.txt/profile"),
    ("--trace", "--trace writes to a folder; give --output_dir"),
    ("--tune", "--tune goes with --vocab_size only; leave out --"),
]
BENCHMARK = [
    ("--teacher none", "give a --teacher"),
    ("--teacher nowhere", "cannot load the teacher nowhere"),
    ("--data_dir void", "void is not a prepared corpus"),
    ("--deepspeed_config nowhere.json", "cannot read the DeepSpeed config nowhere.json"),
    ("--deepspeed_config not_json.json", "the DeepSpeed config not_json.json is not valid JSON"),
    ("--deepspeed_config fp16_and_bf16.json", 'enables both "fp16" and "bf16"'),
    ("--train_batch_size 17", "train_batch_size 17 cannot be divided into micro-batch 8 x 1 ranks"),
    ("--train_batch_size 0", "--train_batch_size must be above 0"),
    ("--rounds 0", "--rounds 0 is below 1"),
    ("--rounds few", "argument --rounds: invalid int value: 'few'"),
    ("--ranks 0", "--ranks 0 is below 1"),
    ("--ranks 1,3", "train_batch_size 16 cannot be divided into micro-batch 8 x 3 ranks"),
    ("--ranks two", "argument --ranks: invalid rank_counts value: 'two'"),
    ("--output result.json", "result.json exists already"),
    ("--output occupied", "occupied exists already"),
    ("--output loop", "loop exists already"),
    ("--output nowhere/result.json", "nowhere/result.json cannot be made"),
    ("--output good.txt/result.json", "good.txt/result.json cannot be made"),
    (f"--output {LONG_NAME}", "File name too long"),
    ("--check nowhere.json", "nowhere.json is no stored benchmark"),
    ("--check result.json", "result.json is no stored benchmark"),
    ("--check not_json.json", "not_json.json is no stored benchmark"),
    ("--contestant theirs", "argument --contestant: invalid choice: 'theirs'"),
]
BENCHMARK_PREPARATION = [
    ("--text nowhere.txt", "there is no text file nowhere.txt"),
    ("--text occupied", "there is no text file occupied"),
    ("--text empty.txt", "empty.txt is empty"),
    ("--text blank.txt", "blank.txt holds no text"),
    ("--text latin1.txt", "latin1.txt is not UTF-8 at byte 4"),
    ("--tokenizer nowhere", "the tokenizer nowhere cannot be loaded"),
    ("--tokenizer no_mask", "the tokenizer no_mask has no mask token"),
    ("--seq_length 15", "--seq_length 15 is not between 16"),
    ("--num_proc 0", "--num_proc 0 is below 1"),
    ("--rounds 0", "--rounds 0 is below 1"),
    ("--output result.json", "result.json exists already"),
    ("--output nowhere/result.json", "nowhere/result.json cannot be made"),
]
QUICKSTART_DATA = [
    ("", "the following arguments are required: --output_dir"),
    ("--output_dir occupied", "occupied exists already"),
    ("--output_dir good.txt", "good.txt exists already"),
    ("--output_dir loop", "loop exists already"),
    ("--output_dir good.txt/data", "cannot write good.txt/data"),
]


@pytest.mark.parametrize(("arguments", "said"), PROFILE)
def test_profile_kernels_refuses(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = "--tokens 32 --vocab_size 100 --hidden_size 16 --device cpu"
    check("profile_kernels.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)


@pytest.mark.parametrize(("arguments", "said"), BENCHMARK)
def test_benchmark_refuses(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = "--deepspeed_config good_config.json --teacher teacher --data_dir corpus"
    options += " --train_batch_size 16 --per_device_train_batch_size 8"
    check("benchmark.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)


@pytest.mark.parametrize(("arguments", "said"), BENCHMARK_PREPARATION)
def test_benchmark_preparation_refuses(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = "--text good.txt --tokenizer tokenizer"
    check("benchmark_preparation.py", f"{options} {arguments}", said, inputs, monkeypatch, capfd)


@pytest.mark.parametrize(("arguments", "said"), QUICKSTART_DATA)
def test_quickstart_data_refuses(
    arguments: str,
    said: str,
    inputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check("quickstart_data.py", arguments, said, inputs, monkeypatch, capfd)


# --- the shell scripts ----------------------------------------------------------------------------------

# In the checkout without .venv, so that a script that refuses nothing installs nothing.
SCRIPTS = [
    ("quickstart.sh --nonsense", "unknown argument --nonsense;"),
    ("quickstart.sh $'two\\nlines'", "unknown argument two lines;"),
    ("quickstart.sh --output_dir", "--output_dir needs a value;"),
    ("quickstart.sh --teacher somebody/bert", "--teacher needs text;"),
    ("quickstart.sh --dataset somebody/text", "--dataset and --text go with --teacher;"),
    ("quickstart.sh --output_dir ../good.txt", "cannot make the folder ../good.txt;"),
    ("quickstart.sh --output_dir ../good.txt/run", "cannot make the folder ../good.txt/run;"),
    ("quickstart.sh --output_dir ../loop", "cannot make the folder ../loop;"),
    ("quickstart.sh --output_dir ''", "cannot make the folder ;"),
    ("quickstart.sh --deepspeed_config nowhere.json", "there is no DeepSpeed config nowhere.json;"),
    ("quickstart.sh --deepspeed_config ../occupied", "there is no DeepSpeed config ../occupied;"),
    ("quickstart.sh --num_train_epochs three", "--num_train_epochs is 'three';"),
    ("quickstart.sh --num_train_epochs 0", "--num_train_epochs is '0';"),
    ("quickstart.sh --num_train_epochs -1", "--num_train_epochs is '-1';"),
    ("quickstart.sh --output_dir ../void", "Python 3.11 or newer is needed;"),
    ("test.sh", "Python 3.11 or newer is needed;"),
    ("v100x8.sh --plan", "distilspeed is not installed for /nowhere/python;"),
    ("NUM_GPUS=0 v100x8.sh --plan", "NUM_GPUS is '0';"),
    ("NUM_GPUS=8x v100x8.sh --plan", "NUM_GPUS is '8x';"),
    ("NUM_GPUS=-1 v100x8.sh --plan", "NUM_GPUS is '-1';"),
    ("MASTER_PORT=http v100x8.sh --plan", "MASTER_PORT is 'http';"),
    ("MASTER_PORT=65536 v100x8.sh --plan", "MASTER_PORT is '65536';"),
    ("multi_node.sh --plan", "--hostfile is needed;"),
    ("multi_node.sh --hostfile", "--hostfile needs a value;"),
    ("multi_node.sh --hostfile ../hosts --plan", "distilspeed is not installed for /nowhere/python;"),
    ("multi_node.sh --hostfile ../hosts --master_port 0", "--master_port is '0';"),
    ("multi_node.sh --hostfile ../hosts --master_port 29500x", "--master_port is '29500x';"),
    ("multi_node.sh --hostfile nowhere --plan", "cannot read the hostfile nowhere;"),
    ("multi_node.sh --hostfile ../occupied --plan", "cannot read the hostfile ../occupied;"),
    ("multi_node.sh --hostfile ../loop --plan", "cannot read the hostfile ../loop;"),
    ("multi_node.sh --hostfile ../hosts_empty --plan", "names no host;"),
    ("multi_node.sh --hostfile ../hosts_without_slots --plan", "has the line 'host1 ';"),
    ("multi_node.sh --hostfile ../hosts_zero --plan", "has the line 'host1 slots=0';"),
    ("multi_node.sh --hostfile ../hosts_word --plan", "has the line 'host1 slots=two';"),
    ("multi_node.sh --hostfile ../hosts_twice --plan", "names host1 twice;"),
    ("multi_node.sh --hostfile ../hosts_windows --plan", "has the line 'host1 slots=1 ';"),
    ("multi_node.sh --hostfile ../hosts_option --plan", "has the line '-oProxyCommand=touch"),
    ("multi_node.sh --hostfile ../hosts_quote --plan", "has the line 'ho\"st slots=1';"),
    ("multi_node.sh --hostfile ../hosts_binary --plan", "has the line "),
    ("slurm.sbatch --plan", "this is no Slurm job;"),
    ("SLURM_JOB_ID=7 slurm.sbatch --plan", "this is no Slurm job;"),
    (
        "SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=/nowhere PATH=../bin:$PATH slurm.sbatch --plan",
        "/nowhere has no launch/job.sh;",
    ),
    ("SLURM_JOB_ID=7 MASTER_PORT=x PATH=../bin:$PATH slurm.sbatch --plan", "MASTER_PORT is 'x';"),
    (
        "SLURM_JOB_ID=7 PATH=../bin:$PATH slurm.sbatch --plan",
        "distilspeed is not installed for /nowhere/python;",
    ),
]


@pytest.mark.parametrize(("command", "said"), SCRIPTS)
def test_a_script_refuses(command: str, said: str, inputs: Path) -> None:
    command = re.sub(r"(\w+\.(sh|sbatch))", r"bash launch/\1", command, count=1)
    hidden = ("SLURM_", "MASTER_", "NUM_GPUS", "CUDA_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    before = snapshot(inputs)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=inputs / "checkout",
        env=environment | {"PYTHON": "/nowhere/python"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    lines = done.stderr.decode(errors="replace").splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, b"", 1), (done.returncode, done.stdout, lines)
    assert said in lines[0]
    assert lines[0].startswith("error: ")
    assert snapshot(inputs) == before
