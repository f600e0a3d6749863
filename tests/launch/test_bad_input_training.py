"""Bad input to launch/train.py but its DeepSpeed config: status 2 and one line, and the folder stays unchanged."""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from refusals import Inputs, Refused
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from user_errors import assert_names

Damage = Callable[[Path], None]


# --- arguments ------------------------------------------------------------------------------------------

NUMBERS = {
    "max_steps": ["0", "-1", "1.5", "nan", "many"],
    "num_train_epochs": ["0", "-1", "nan", "inf", "three"],
    "train_batch_size": ["0", "-16", "1e3", "inf", ""],
    "per_device_train_batch_size": ["0", "-1", "2.0"],
    "learning_rate": ["0", "-1e-4", "nan", "inf", "fast"],
    "temperature": ["0", "-2", "nan", "inf", "hot"],
    "alpha_ce": ["-1", "nan", "inf", "-inf", "all"],
    "alpha_mlm": ["-0.5", "nan", "inf"],
    "alpha_cos": ["-1e-9", "nan", "inf"],
    "seed": ["-1", "4294967296", "0.5", "random"],
    "save_steps": ["0", "-5", "often"],
    "save_retain_steps": ["0", "-1", "all"],
    "ddp_timeout": ["0", "-1", "nan", "inf", "long"],
    "save_total_limit": ["0", "-1", "few"],
    "logging_steps": ["0", "-1", "ten"],
    "dataloader_num_workers": ["-1", "two"],
    "gpu_memory": ["0 --plan", "-1 --plan", "nan --plan", "inf --plan", "lots --plan"],
}
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "an unknown flag": ("--nonsense", "bad-argument", "--nonsense"),
    "a misspelt flag": ("--learning_rat 1e-4", "bad-argument", "--learning_rat"),
    "a flag without its value": ("--temperature", "bad-argument", "--temperature"),
    "a word too many": ("again", "bad-argument", "again"),
    "steps and epochs": (
        "--max_steps 3 --num_train_epochs 1",
        "conflicting-arguments",
        "--max_steps",
        "--num_train_epochs",
    ),
    "no loss left": (
        "--alpha_ce 0 --alpha_mlm 0 --alpha_cos 0",
        "bad-argument",
        "--alpha_ce",
        "--alpha_mlm",
        "--alpha_cos",
    ),
    "two starts of the student": (
        "--student S --student_config C",
        "conflicting-arguments",
        "--student",
        "--student_config",
    ),
    "layers of a teacher for another student": (
        "--student S --student_layers 0,1",
        "conflicting-arguments",
        "--student",
        "--student_layers",
    ),
    "layers of a teacher for random weights": (
        "--student_config C --student_layers 0,1",
        "conflicting-arguments",
        "--student_config",
        "--student_layers",
    ),
    "a card and no plan": ("--gpu_memory 16", "missing-argument", "--gpu_memory", "--plan"),
    "an indivisible batch": (
        "--train_batch_size 18 --per_device_train_batch_size 4",
        "indivisible-batch",
        "train_batch_size 18",
        "16",
        "20",
    ),
    "apex on a CPU": ("--apex_layer_norm", "no-gpu", "--apex_layer_norm", "cpu"),
    "a layer too high": ("--student_layers 0,4", "bad-argument", "--student_layers 0,4", "0 to 3"),
    "a negative layer": ("--student_layers=-1,2", "bad-argument", "--student_layers -1,2", "0 to 3"),
    "a repeated layer": ("--student_layers 1,1", "bad-argument", "--student_layers 1,1"),
    "descending layers": ("--student_layers 3,0", "bad-argument", "--student_layers 3,0"),
    "too many layers": ("--student_layers 0,1,2,3,4", "bad-argument", "--student_layers 0,1,2,3,4", "0 to 3"),
    "layers that are no numbers": ("--student_layers a,b", "bad-argument", "--student_layers", "a,b"),
    "a hole in the layers": ("--student_layers 0,,3", "bad-argument", "--student_layers", "0,,3"),
    "fractional layers": ("--student_layers 0.5", "bad-argument", "--student_layers", "0.5"),
    "no layers": ("--student_layers=", "bad-argument", "--student_layers"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS for value in NUMBERS[name]])
def test_numbers(inputs: Inputs, refused: Refused, name: str, value: str) -> None:
    parts = value.split(" ")
    line = refused(inputs.command(f"--{name}={parts[0]}", *parts[1:]))
    assert_names(line, "bad-argument", f"--{name}")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(inputs: Inputs, refused: Refused, name: str) -> None:
    given, code, *named = ARGUMENTS[name]
    assert_names(refused(inputs.command(*given.split())), code, *named)


@pytest.mark.parametrize("missing", ["deepspeed_config", "teacher", "data_dir", "output_dir"])
def test_a_missing_argument(inputs: Inputs, refused: Refused, missing: str) -> None:
    command = inputs.command()
    place = command.index(f"--{missing}")
    assert_names(refused(command[:place] + command[place + 2 :]), "missing-argument", f"--{missing}")


WITHOUT_TEACHER = {
    "no config": ("", "missing-argument", "--student_config"),
    "no student": ("", "missing-argument", "--student "),
    "two models": (
        "--student C --student_config C",
        "conflicting-arguments",
        "--student and --student_config",
    ),
    "layers of no teacher": (
        "--student_config C --student_layers 0,1",
        "conflicting-arguments",
        "--student_layers",
    ),
    "no teacher to share out": (
        "--student_config C --teacher_zero3",
        "conflicting-arguments",
        "--teacher_zero3",
    ),
    "nothing but the teacher's losses": ("--student_config C --alpha_mlm 0", "bad-argument", "--alpha_mlm"),
}


@pytest.mark.parametrize("name", WITHOUT_TEACHER)
def test_arguments_without_a_teacher(inputs: Inputs, refused: Refused, name: str) -> None:
    given, code, named = WITHOUT_TEACHER[name]
    parts = [inputs.teacher if part == "C" else part for part in given.split()]
    assert_names(refused(inputs.command(*parts, teacher="none")), code, named)


# --- corpora --------------------------------------------------------------------------------------------


def flip(name: str) -> Damage:
    """Return a function that changes one bit in the middle of a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def shortened(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def with_text(name: str, text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def with_values(name: str, **values: object) -> Damage:
    """Return a function that replaces top-level values of a JSON file."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return damage


def vouch(folder: Path) -> None:
    """Update the manifest to the present files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["files"]:
        content = (folder / record["path"]).read_bytes()
        record |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_train_rows(change: Callable[[datasets.Dataset], datasets.Dataset]) -> Damage:
    """Return a function that replaces the training rows and updates the manifest."""

    def damage(folder: Path) -> None:
        changed = change(datasets.load_from_disk(str(folder / "train"), keep_in_memory=True))
        changed.save_to_disk(str(folder / "new"), num_shards=1)
        (folder / "new" / "data-00000-of-00001.arrow").rename(folder / "new" / "data.arrow")
        with_values("new/state.json", _data_files=[{"filename": "data.arrow"}])(folder)
        shutil.rmtree(folder / "train")
        (folder / "new").rename(folder / "train")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["counts"]["train_rows"] = len(changed)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        vouch(folder)

    return damage


def beyond_the_vocabulary(rows: datasets.Dataset) -> datasets.Dataset:
    def change(row: dict[str, Any], index: int) -> dict[str, Any]:
        return row | {"input_ids": [60000, *row["input_ids"][1:]]} if index == 7 else row

    return rows.map(change, with_indices=True, features=rows.features)


def shuffled_counts(folder: Path) -> None:
    np.save(folder / "token_counts.npy", np.load(folder / "token_counts.npy")[:-1])
    vouch(folder)


def pickled_counts(folder: Path) -> None:
    np.save(folder / "token_counts.npy", np.array([{}], dtype=object), allow_pickle=True)
    vouch(folder)


CORPORA: dict[str, tuple[Damage, str, *tuple[str, ...]]] = {
    **{
        f"a flipped bit in {name}": (flip(name), "damaged-corpus", name)
        for name in (
            "train/data.arrow",
            "held_out/data.arrow",
            "token_counts.npy",
            "tokenizer/tokenizer.json",
        )
    },
    **{
        f"a flipped bit in {name}": (flip(name), "damaged-corpus")
        for name in ("train/state.json", "train/dataset_info.json")
    },
    **{
        f"no {name}": (without(name), "damaged-corpus", name)
        for name in (
            "train/data.arrow",
            "held_out/state.json",
            "token_counts.npy",
            "tokenizer/tokenizer.json",
        )
    },
    "no manifest": (without("manifest.json"), "not-a-corpus", "manifest.json"),
    "no training rows' folder": (
        lambda folder: shutil.rmtree(folder / "train"),
        "damaged-corpus",
        "train/data.arrow",
    ),
    "half the rows": (shortened("train/data.arrow"), "damaged-corpus", "train/data.arrow"),
    "half the manifest": (shortened("manifest.json"), "damaged-corpus", "manifest.json"),
    "an empty manifest": (with_text("manifest.json", ""), "damaged-corpus", "manifest.json"),
    "a manifest that is a list": (with_text("manifest.json", "[]"), "damaged-corpus", "manifest.json"),
    "a manifest nested deeply": (
        with_text("manifest.json", "[" * 100_000),
        "damaged-corpus",
        "manifest.json",
    ),
    "a foreign format": (with_values("manifest.json", format_version=2), "unsupported-format", "format 2"),
    "a format in words": (with_values("manifest.json", format_version="1"), "unsupported-format"),
    "a vocabulary in words": (
        with_values("manifest.json", vocab_size="many"),
        "damaged-corpus",
        "manifest.json",
        "vocab_size",
    ),
    "rows of null": (
        with_values("manifest.json", seq_length=None),
        "damaged-corpus",
        "manifest.json",
        "seq_length",
    ),
    "rows of another length": (with_values("manifest.json", seq_length=32), "damaged-corpus", "64", "32"),
    "a mask token beyond the vocabulary": (
        with_values("manifest.json", mask_id=99999),
        "damaged-corpus",
        "manifest.json",
    ),
    "counts that are a list": (
        with_values("manifest.json", counts=[]),
        "damaged-corpus",
        "manifest.json",
        "counts",
    ),
    "files that are a number": (
        with_values("manifest.json", files=3),
        "damaged-corpus",
        "manifest.json",
        "files",
    ),
    "a smaller vocabulary": (
        with_values("manifest.json", vocab_size=500),
        "damaged-corpus",
        "token_counts.npy",
        "500",
    ),
    "a token beyond the vocabulary": (
        with_train_rows(beyond_the_vocabulary),
        "damaged-corpus",
        "train",
        "60000",
    ),
    "no training rows": (with_train_rows(lambda rows: rows.select([])), "not-enough-text"),
    "rows without their lengths": (
        with_train_rows(lambda rows: rows.remove_columns("real_tokens")),
        "damaged-corpus",
        "real_tokens",
    ),
    "token counts of another vocabulary": (shuffled_counts, "damaged-corpus", "token_counts.npy"),
    "token counts that are a pickle": (pickled_counts, "damaged-corpus"),
    "another tokenizer": (
        with_values("manifest.json", tokenizer_hash="0" * 64),
        "tokenizer-mismatch",
        "--tokenizer",
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, code, *named = CORPORA[name]
    corpus = inputs.folder / "corpus"
    shutil.copytree(inputs.corpus, corpus)
    damage(corpus)
    assert_names(refused(inputs.command(data_dir=corpus)), code, *named)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("absent", "not-a-corpus"),
        ("file", "not-a-corpus"),
        ("loop", "damaged-corpus"),
        ("file/corpus", "not-a-corpus"),
        ("empty", "not-a-corpus"),
    ],
)
def test_a_path_that_is_not_a_corpus(inputs: Inputs, refused: Refused, path: str, code: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "empty").mkdir()
    (inputs.folder / "loop").symlink_to("loop")
    assert_names(refused(inputs.command(data_dir=inputs.folder / path)), code, str(inputs.folder / path))


# --- teachers -------------------------------------------------------------------------------------------


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_value(value: float) -> Damage:
    name = "bert.encoder.layer.2.output.dense.weight"
    return with_weights(lambda weights: weights[name].view(-1)[5:6].fill_(value))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def llama(folder: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)


def encoder_alone(folder: Path) -> None:
    BertModel(BertConfig.from_pretrained(folder)).save_pretrained(folder)


def without_mask_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[HIDE]"))


def with_another_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["distilspeed"])
    tokenizer.save_pretrained(folder)


def vocabulary_alone(folder: Path) -> None:
    """Replace the tokenizer by another one of the same size, only in vocab.txt."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    pieces[-2:] = reversed(pieces[-2:])
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")


CONFIGS_OF_MODELS: dict[str, tuple[Damage, str, *tuple[str, ...]]] = {
    "no config": (without("config.json"), "unusable-model"),
    "a config that is not JSON": (with_text("config.json", "{"), "unusable-model"),
    "an empty config": (with_text("config.json", ""), "unusable-model"),
    "a config that is a list": (with_text("config.json", "[]"), "unusable-model"),
    "a config without an architecture": (with_text("config.json", "{}"), "unusable-model"),
    "an unknown architecture": (with_values("config.json", model_type="mine"), "unusable-model", "mine"),
    "code from the hub": (
        with_text("config.json", '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}'),
        "unusable-model",
    ),
    "a hidden size in words": (
        with_values("config.json", hidden_size="wide"),
        "unusable-model",
        "hidden_size",
        "'wide'",
    ),
    "heads that do not divide": (
        with_values("config.json", num_attention_heads=3),
        "unusable-model",
        "heads",
    ),
    "no heads": (with_values("config.json", num_attention_heads=0), "unusable-model"),
    "no layers": (with_values("config.json", num_hidden_layers=0), "unsupported-model", "layers"),
    "negative layers": (with_values("config.json", num_hidden_layers=-2), "unsupported-model", "-2 layers"),
    "an unknown activation": (
        with_values("config.json", hidden_act="gelu_mine"),
        "unusable-model",
        "gelu_mine",
    ),
    "a negative dropout": (
        with_values("config.json", hidden_dropout_prob=-0.5),
        "unusable-model",
        "dropout",
        "-0.5",
    ),
    "dropout in words": (
        with_values("config.json", hidden_dropout_prob="some"),
        "unusable-model",
        "hidden_dropout_prob",
        "'some'",
    ),
}
TEACHERS: dict[str, tuple[Damage, str, *tuple[str, ...]]] = {
    **CONFIGS_OF_MODELS,
    "no weights": (without("model.safetensors"), "unusable-model", "model.safetensors"),
    "pickled weights alone": (pickled, "pickled-weights", "pytorch_model.bin", ".save_pretrained(FOLDER)"),
    "empty weights": (with_text("model.safetensors", ""), "unusable-model"),
    "half the weights": (shortened("model.safetensors"), "unusable-model"),
    "weights that are text": (with_text("model.safetensors", "not safetensors" * 100), "unusable-model"),
    "a header that is too long": (with_text("model.safetensors", "\x7f" * 64), "unusable-model"),
    "a NaN": (with_value(float("nan")), "damaged-model", "layer.2.output.dense.weight"),
    "an infinity": (with_value(float("-inf")), "damaged-model", "layer.2.output.dense.weight"),
    "a layer missing": (
        with_weights(lambda weights: weights.pop("bert.encoder.layer.1.output.dense.bias")),
        "damaged-model",
        "layer.1.output.dense.bias",
    ),
    "more layers than weights": (
        with_values("config.json", num_hidden_layers=6),
        "damaged-model",
        "bert.encoder.layer.4.",
    ),
    "weights of another width": (
        with_values("config.json", intermediate_size=128),
        "damaged-model",
        "intermediate.dense.bias",
        "[64]",
        "[128]",
        "config.json",
    ),
    "fewer positions than the rows have": (
        lambda folder: (
            with_values("config.json", max_position_embeddings=32)(folder),
            with_weights(
                lambda weights: weights.update(
                    {name: weights[name][:32].clone() for name in weights if "position_embed" in name}
                )
            )(folder),
        )[0],
        "rows-too-long",
        "64",
        "--seq_length 32",
    ),
    "a Llama": (llama, "unsupported-model", '"llama"', '"bert"'),
    "an encoder without a head": (encoder_alone, "damaged-model", "cls.predictions.bias"),
    "a decoder": (with_values("config.json", is_decoder=True), "unsupported-model", "is_decoder"),
    "another epsilon": (
        with_values("config.json", layer_norm_eps=1e-5),
        "unsupported-model",
        "layer_norm_eps 1e-05",
    ),
    "a tokenizer that is not JSON": (with_text("tokenizer.json", "{"), "unusable-tokenizer"),
    "a tokenizer without a mask token": (without_mask_token, "tokenizer-mismatch", "--tokenizer"),
    "a tokenizer with a token more": (with_another_token, "tokenizer-mismatch", "--tokenizer"),
    "another tokenizer in vocab.txt alone": (vocabulary_alone, "tokenizer-mismatch", "--tokenizer"),
    "a tokenizer without its vocabulary": (without("tokenizer.json"), "unusable-tokenizer", "tokenizer.json"),
    "tied weights, untied in the config": (
        with_values("config.json", tie_word_embeddings=False),
        "damaged-model",
        "cls.predictions.decoder.bias",
        "cls.predictions.decoder.weight",
        '"tie_word_embeddings"',
        "config.json",
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, code, *named = TEACHERS[name]
    teacher = inputs.folder / "teacher"
    shutil.copytree(inputs.teacher, teacher)
    damage(teacher)
    assert_names(refused(inputs.command(teacher=teacher)), code, str(teacher), *named)


@pytest.mark.parametrize("name", CONFIGS_OF_MODELS)
def test_a_students_config(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, code, *named = CONFIGS_OF_MODELS[name]
    student = inputs.folder / "student"
    shutil.copytree(inputs.teacher, student)
    damage(student)
    line = refused(inputs.command("--student_config", student, teacher="none"))
    assert_names(line, code, "config", str(student), *named)


# --- students -------------------------------------------------------------------------------------------


def distilbert(**changed: object) -> Damage:
    """Return a function that replaces the model by a DistilBERT of other sizes; the tokenizer stays."""
    sizes = {"vocab_size": 1000, "dim": 32, "n_heads": 4, "n_layers": 1, "hidden_dim": 8}
    config = DistilBertConfig(**sizes | {"max_position_embeddings": 64} | changed)
    return lambda folder: DistilBertForMaskedLM(config).save_pretrained(folder)


def roberta_without_tokenizer(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    config = BertConfig().to_dict() | {"vocab_size": 1000, "hidden_size": 8, "num_attention_heads": 1}
    config |= {"model_type": "roberta", "num_hidden_layers": 1, "intermediate_size": 8}
    RobertaForMaskedLM(RobertaConfig(**config)).save_pretrained(folder)


STUDENTS: dict[str, tuple[Damage, str, *tuple[str, ...]]] = {
    "no weights": (without("model.safetensors"), "unusable-model", "model.safetensors"),
    "a NaN": (with_value(float("nan")), "damaged-model", "layer.2.output.dense.weight"),
    "a layer missing": (
        with_weights(lambda weights: weights.pop("bert.encoder.layer.1.output.dense.bias")),
        "damaged-model",
        "layer.1.output.dense.bias",
    ),
    "an encoder without a head": (encoder_alone, "damaged-model", "cls.predictions.bias"),
    "a tokenizer with a token more": (with_another_token, "tokenizer-mismatch", "--tokenizer"),
    "fewer tokens than the corpus": (distilbert(vocab_size=999), "tokenizer-mismatch", "999", "1000"),
    "fewer positions than the rows have": (
        distilbert(max_position_embeddings=63),
        "rows-too-long",
        "64",
        "--seq_length 63",
    ),
    "another family": (roberta_without_tokenizer, "unsupported-model", '"roberta"', '"bert"', '"distilbert"'),
    "a Llama": (llama, "unsupported-model", '"llama"'),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, code, *named = STUDENTS[name]
    student = inputs.folder / "student"
    shutil.copytree(inputs.teacher, student)
    damage(student)
    assert_names(refused(inputs.command("--student", student)), code, "student", str(student), *named)


@pytest.mark.parametrize(
    ("given", "code", "named"),
    [
        ("--alpha_cos 1", "conflicting-arguments", ("--alpha_cos 1", "16", "32")),
        ("--alpha_cos=2", "conflicting-arguments", ("--alpha_cos 2", "16", "32")),
        ("--alpha_ce 0 --alpha_mlm 0", "bad-argument", ("--alpha_ce", "--alpha_mlm")),
    ],
)
@pytest.mark.parametrize("start", ["student", "student_config"])
def test_losses_that_need_equal_widths(
    inputs: Inputs, refused: Refused, start: str, given: str, code: str, named: tuple[str, ...]
) -> None:
    student = inputs.folder / "student"
    shutil.copytree(inputs.teacher, student)
    distilbert(dim=16)(student)
    assert_names(refused(inputs.command(f"--{start}", student, *given.split())), code, *named)


@pytest.mark.parametrize("path", ["absent", "file", "loop", "empty"])
@pytest.mark.parametrize("role", ["teacher", "student", "student_config"])
def test_a_path_that_is_not_a_model(inputs: Inputs, refused: Refused, role: str, path: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "empty").mkdir()
    (inputs.folder / "loop").symlink_to("loop")
    given = {"teacher": "none"} | {role: inputs.folder / path}
    line = refused(inputs.command(**given))
    assert_names(line, "unusable-model", role.removesuffix("_config"), str(inputs.folder / path))


# --- output folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("file", "unwritable-output"),
        ("file/run", "unwritable-output"),
        ("loop", "unwritable-output"),
        ("loop/run", "unwritable-output"),
        ("occupied", "output-exists"),
        ("dangling", "unwritable-output"),
    ],
)
def test_an_occupied_output_folder(inputs: Inputs, refused: Refused, path: str, code: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "loop").symlink_to("loop")
    (inputs.folder / "dangling").symlink_to("nowhere")
    (inputs.folder / "occupied").mkdir()
    (inputs.folder / "occupied" / "notes.txt").write_text("mine")
    output_dir = inputs.folder / path
    assert_names(refused(inputs.command(output_dir=output_dir)), code, str(output_dir))


@pytest.mark.parametrize("role", ["teacher", "data_dir", "student"])
@pytest.mark.parametrize("below", [".", "run"])
def test_an_output_folder_inside_an_input(inputs: Inputs, refused: Refused, role: str, below: str) -> None:
    folder = inputs.folder / role
    shutil.copytree(inputs.corpus if role == "data_dir" else inputs.teacher, folder)
    line = refused(inputs.command("--resume", **{role: folder, "output_dir": folder / below}))
    assert_names(line, "output-inside-input", f"--{role}", str(folder))


def test_an_unwritable_output_folder(
    inputs: Inputs, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != inputs.folder)  # root may write anywhere
    assert_names(refused(inputs.command()), "unwritable-output", str(inputs.folder))
