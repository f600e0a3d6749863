"""Write a folder of malformed files for test_bad_input_commands.py, and the good files they are made from."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import string
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import torch
from launcher import CPU_CONFIG, ROOT
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ByT5Tokenizer,
)

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.build import prepare_corpus
from distilspeed.trainer.corpus.lines import LONGEST_LINE
from distilspeed.trainer.corpus.recognition import READ_BYTES
from distilspeed.trainer.corpus.shard import Shard
from distilspeed.trainer.models.loading import load_teacher, make_student

LONG_NAME = "n" * 300
SENTENCE = "this is a sentence of more than twelve tokens, so that it is a piece of its own"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def write_inputs(folder: Path, text: Path, tokenizer: Path, teacher: Path, corpus: Path) -> None:
    shutil.copy(text, folder / "good.txt")
    for source, name in (
        (tokenizer, "tokenizer"),
        (teacher, "teacher"),
        (corpus, "corpus"),
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
    _write_models(folder)
    _write_corpora(folder)
    _write_tasks(folder)
    _write_configs(folder)
    _write_scripts(folder)


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
        "cut.txt.gz": gzip.compress(text * 100)[:-9],
        "empty.txt.gz": gzip.compress(b""),
        "blank.txt.gz": gzip.compress(b" \n"),
        "latin1.txt.xz": lzma.compress(b"Stra\xdfe\n"),
        "endless.txt.gz": gzip.compress(b"a" * (LONGEST_LINE + 2 * READ_BYTES), 1),
        "twice.txt.gz": gzip.compress(gzip.compress(text * 100)),
        "tar.tar.gz": gzip.compress(_archive(text)),
        "dump.xml.bz2": bz2.compress(b'<mediawiki xml:lang="en">\n' + text * 100),
        "wiki_00": b'<doc id="12" url="" title="Anarchism">\n' + text * 100 + b"</doc>\n",
        "page.HTM": b"\n<!DOCTYPE html>\n" + text * 100,
        "table.csv": b"text,label\n" + text * 100,
        "TABLE.TSV.gz": gzip.compress(b"text\tlabel\n" + text * 100),
        "records.txt": b'{"text": "a"}\n' + text * 100,
        "records": b'\xef\xbb\xbf\n{"body": "a"}\n',
        "sentences.txt": text * 900_000 + b"\n",
        "records.json.gz": gzip.compress(b'{"body": "a"}\n'),
        "packed.jsonl.zst": b"\x28\xb5\x2f\xfd" + bytes(range(256)),
        "endless.txt": b"a" * (LONGEST_LINE + 2 * READ_BYTES),
        "endless.jsonl": b'{"text": "' + b"a" * (LONGEST_LINE + 2 * READ_BYTES) + b'"}\n',
        "empty.txt": b"",
        "mark.txt": b"\xef\xbb\xbf",
        "blank.txt": "\n \t\u2003\r\n\u3000\n".encode(),
        "words.txt": b"word\n\nanother\n" * 1000,
        "straddling.txt": b"a" * (READ_BYTES - 1) + "é".encode() + b"\xff",
        "few.txt": text,
        "unknown.txt": "\u16a0\u16a1 ".encode() * 1000,
        "latin1.jsonl": b'{"text": "Stra\xdfe"}\n',
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "other.jsonl": b'{"text": "a"}\n{"body": "a"}\n',
        "number.jsonl": b'{"text": 3}\n',
        "string.jsonl": b'"text"\n',
        "STRING.NDJSON.GZ": gzip.compress(b'"text"\n'),
        "deep.jsonl": b"[" * 100_000 + b"\n",
        "deep.json": b"[" * 100_000,
        "digits.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
        "cut.json": b'[{"text": "a"}',
        "other.json": b'[{"body": "a"}]',
        "objects.json": b'[["a"]]',
        "array.json": b"[]",
        # Every shard of an array reads the whole file.
        "latin1.json": b'[{"text": "a"},\n{"text": "b"},\n{"text": "c"},\n{"text": "Stra\xdfe"}]',
        "broken.parquet": b"PAR1",
        "config.json": b"{}",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "good.jsonl").write_text(json.dumps({"text": SENTENCE}) + "\n")
    records = pa.table({"text": [SENTENCE] * 100, "number": range(100)})
    pyarrow.parquet.write_table(records, folder / "good.parquet")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "good.parquet.gz").write_bytes(gzip.compress(whole))
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.parquet").write_bytes(whole.replace(b"sentence", b"\xff" * 8))


def _archive(text: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("book.txt")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return file.getvalue()


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
    (folder / "cased_vocabulary").mkdir()
    capitals = " ".join([*string.ascii_uppercase, *string.ascii_lowercase, "York", "##York"])
    (folder / "cased_vocabulary" / "vocab.txt").write_text(
        "\n".join(f"[PAD] [UNK] [CLS] [SEP] [MASK] {capitals}".split()) + "\n"
    )
    (folder / "cased_vocabulary" / "config.json").write_text('{"model_type": "bert"}')
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
        arguments: dict[str, Any] = {"text": (folder / "good.txt",), "tokenizer": str(folder / "tokenizer")}
        arguments |= {"seq_length": 64, "held_out_fraction": 0.1, **changes}
        prepare_corpus(CorpusArguments(output_dir=folder / name, num_proc=1, shard=shard, **arguments))

    text = (folder / "good.txt").read_text(encoding="utf-8")
    (folder / "paragraphs.txt").write_text(text.replace("\n", "\n\n"), encoding="utf-8")
    prepare("shard0", Shard(0, 2))
    prepare("shard0_lines", Shard(0, 2), text=(folder / "paragraphs.txt",))
    prepare("shard1", Shard(1, 2))
    prepare("shard1_of_3", Shard(1, 3))
    prepare("shard1_shorter", Shard(1, 2), seq_length=32)
    prepare(
        "shard1_paragraphs", Shard(1, 2), document_separator="blank_line", text=(folder / "paragraphs.txt",)
    )
    prepare("shard1_more", Shard(1, 2), text=(folder / "good.txt",) * 2)
    prepare("shard1_tokenizer", Shard(1, 2), tokenizer=str(folder / "other_tokenizer"))
    shutil.copytree(folder / "shard0", folder / "shard0_again")
    for name in ("shard0", "shard1"):
        manifest = json.loads(
            (shutil.copytree(folder / name, folder / f"{name}_old") / "manifest.json").read_text()
        )
        manifest["versions"]["tokenizers"] = "0.1"
        (folder / f"{name}_old" / "manifest.json").write_text(json.dumps(manifest))
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
    AlbertForMaskedLM(AlbertConfig(vocab_size=vocab_size, **TINY)).save_pretrained(folder / "albert")
    for name in (
        "pickled_weights",
        "cut_weights",
        "nan_weights",
        "no_config",
        "config_not_json",
        "head_dropout",
        "decoder",
        "config_untied",
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
    settings: dict[str, dict[str, Any]] = {
        "head_dropout": {"classifier_dropout": 5.0},
        "decoder": {"is_decoder": True},
        "config_untied": {"tie_word_embeddings": False},
    }
    for name, setting in settings.items():
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | setting))
    (folder / "no_config" / "config.json").unlink()
    (folder / "config_not_json" / "config.json").write_text("{")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    teacher_vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens("another")
    tokenizer.save_pretrained(folder / "other_tokenizer")
    # A vocabulary of the same size, only in vocab.txt; and no vocabulary.
    for name in ("other_vocabulary", "no_vocabulary"):
        shutil.copytree(folder / "teacher", folder / name)
        (folder / name / "tokenizer.json").unlink()
    (folder / "other_vocabulary" / "tokenizer_config.json").unlink()
    pieces = sorted(teacher_vocabulary, key=teacher_vocabulary.__getitem__)
    pieces[-2:] = reversed(pieces[-2:])
    (folder / "other_vocabulary" / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))


def _write_tasks(folder: Path) -> None:
    good = [{"text": f"the list {number}", "label": number % 2} for number in range(8)]
    changed: dict[str, Any] = {
        "good": {},
        "no_label": {"label": None},
        "label_list": {"label": [1]},
        "label_nan": {"label": float("nan")},
        "label_score": {"label": "3.5"},
        "label_exponent": {"label": "-1e-3"},
        "label_empty": {"label": ""},
        "unlabelled": {"label": -1},
        "text_number": {"text": 1},
        "one_class": {"label": 1},
    }
    for name, change in changed.items():
        _write_task(folder / "tasks" / name, "".join(json.dumps(record | change) + "\n" for record in good))
    lines = "".join(json.dumps(record) + "\n" for record in good)
    for name, dev in (
        ("new_class", '{"text": "a", "label": 7}\n'),
        ("mixed", '{"text_a": "a", "text_b": "b", "label": 1}\n'),
        ("kinds_in_dev", '{"text": "a", "label": "1"}\n'),
        ("score_in_dev", '{"text": "a", "label": 0.5}\n'),
        ("unlabelled_dev", '{"text": "a", "label": "-"}\n'),
        ("empty_dev", ""),
        ("not_json", "{\n"),
        ("deep", "[" * 100_000 + "\n"),
        ("array", "[1]\n"),
        ("half_pair", '{"text_a": "a", "label": 1}\n'),
        ("no_dev", None),
    ):
        _write_task(folder / "tasks" / name, lines, dev)
    more: tuple[Any, ...] = ("1", True, -1)
    scores = lines.replace(": 0}", ": 0.5}")
    _write_task(folder / "tasks" / "score_and_class", scores + '{"text": "a", "label": "no"}\n', scores)
    for name, label in zip(("kinds", "booleans", "minus_one"), more, strict=True):
        another = json.dumps({"text": "a", "label": label}) + "\n"
        _write_task(folder / "tasks" / name, lines + another, lines)
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
    """Write a checkout without .venv, and hostfiles."""
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
