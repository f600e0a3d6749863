"""What launch/train.py refuses: every case ends with status 2 and one line, and leaves the folder as it was."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from launcher import CPU_CONFIG
from refusals import refusal
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

Refused = Callable[..., str]
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Inputs:
    """A folder to work in, and a teacher and a corpus outside it that go together."""

    folder: Path
    teacher: Path
    corpus: Path

    def command(self, *more: object, **changed: object) -> list[object]:
        """A command line that would train, but for ``changed`` options and what follows them."""
        options = {
            "deepspeed_config": CPU_CONFIG,
            "teacher": self.teacher,
            "data_dir": self.corpus,
            "output_dir": self.folder / "run",
        } | changed
        return [part for name, value in options.items() for part in (f"--{name}", value)] + [*more]


@pytest.fixture
def inputs(tmp_path: Path, tiny_teacher_dir: Path, small_corpus_dir: Path) -> Inputs:
    return Inputs(tmp_path, tiny_teacher_dir, small_corpus_dir)


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[object]], str]:
    """Run the command and return its one line; it must come before any training."""
    monkeypatch.setattr(
        "distilspeed.trainer.training.loop.train", lambda run: pytest.fail("the training started")
    )
    return lambda arguments: refusal("train.py", arguments, tmp_path, monkeypatch, capfd)


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
    "gpu_memory": ["0 --plan", "-1 --plan", "nan --plan", "inf --plan", "lots --plan", "16"],
}
ARGUMENTS = {
    "an unknown flag": ("--nonsense", "--nonsense"),
    "a misspelt flag": ("--learning_rat 1e-4", "--learning_rat"),
    "a flag without its value": ("--temperature", "--temperature"),
    "a word too many": ("again", "again"),
    "steps and epochs": ("--max_steps 3 --num_train_epochs 1", "not allowed with"),
    "no loss left": ("--alpha_ce 0 --alpha_mlm 0 --alpha_cos 0", "no loss"),
    "a config for a distilled student": ("--student_config bert", "--teacher none"),
    "an indivisible batch": ("--train_batch_size 18 --per_device_train_batch_size 4", "16 and 20"),
    "apex on a CPU": ("--apex_layer_norm", "GPU"),
    "a layer too high": ("--student_layers 0,4", "0 to 3"),
    "a negative layer": ("--student_layers=-1,2", "0 to 3"),
    "a repeated layer": ("--student_layers 1,1", "1,1"),
    "descending layers": ("--student_layers 3,0", "must rise"),
    "too many layers": ("--student_layers 0,1,2,3,4", "0 to 3"),
    "layers that are no numbers": ("--student_layers a,b", "--student_layers"),
    "a hole in the layers": ("--student_layers 0,,3", "--student_layers"),
    "fractional layers": ("--student_layers 0.5", "--student_layers"),
    "no layers": ("--student_layers=", "--student_layers"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS for value in NUMBERS[name]])
def test_numbers(inputs: Inputs, refused: Refused, name: str, value: str) -> None:
    parts = value.split(" ")
    line = refused(inputs.command(f"--{name}={parts[0]}", *parts[1:]))
    assert name in line


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(inputs: Inputs, refused: Refused, name: str) -> None:
    given, named = ARGUMENTS[name]
    assert named in refused(inputs.command(*given.split()))


@pytest.mark.parametrize("missing", ["deepspeed_config", "teacher", "data_dir", "output_dir"])
def test_a_missing_argument(inputs: Inputs, refused: Refused, missing: str) -> None:
    command = inputs.command()
    place = command.index(f"--{missing}")
    assert f"--{missing}" in refused(command[:place] + command[place + 2 :])


WITHOUT_TEACHER = {
    "no config": ("", "--student_config"),
    "layers of no teacher": ("--student_config C --student_layers 0,1", "--student_layers"),
    "no teacher to share out": ("--student_config C --teacher_zero3", "--teacher_zero3"),
    "nothing but the teacher's losses": ("--student_config C --alpha_mlm 0", "--alpha_mlm"),
}


@pytest.mark.parametrize("name", WITHOUT_TEACHER)
def test_arguments_without_a_teacher(inputs: Inputs, refused: Refused, name: str) -> None:
    given, named = WITHOUT_TEACHER[name]
    parts = [inputs.teacher if part == "C" else part for part in given.split()]
    assert named in refused(inputs.command(*parts, teacher="none"))


# --- DeepSpeed configs ----------------------------------------------------------------------------------

CONFIG_FILES = {
    "not JSON": (b"{", "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "not UTF-8": (b'{"train_batch_size": "\xff"}', "not valid JSON"),
    "a comment": (b"{} // mine", "not valid JSON"),
    "a trailing comma": (b'{"train_batch_size": 8,}', "not valid JSON"),
    "an array": (b"[1, 2]", "JSON object"),
    "a string": (b'"auto"', "JSON object"),
    "a key twice": (b'{"train_batch_size": 8, "train_batch_size": 16}', '"train_batch_size" stands twice'),
    "a key twice in a section": (b'{"zero_optimization": {"stage": 1, "stage": 2}}', '"stage" stands twice'),
    "NaN": (b'{"gradient_clipping": NaN}', "NaN"),
    "Infinity": (b'{"gradient_clipping": Infinity}', "Infinity"),
    "a number that overflows": (b'{"gradient_clipping": 1e999}', "1e999"),
    "an endless number": (b'{"train_batch_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a huge number": (b'{"train_batch_size": ' + b"9" * 400 + b"}", "too large"),
    "deeply nested": (b'{"zero_optimization": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_config_file(inputs: Inputs, refused: Refused, name: str) -> None:
    content, named = CONFIG_FILES[name]
    path = inputs.folder / "config.json"
    path.write_bytes(content)
    assert named in refused(inputs.command(deepspeed_config=path))


@pytest.mark.parametrize("path", ["absent.json", ".", "file/config.json", "loop"])
def test_a_config_that_cannot_be_read(inputs: Inputs, refused: Refused, path: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "loop").symlink_to("loop")
    line = refused(inputs.command(deepspeed_config=inputs.folder / path))
    assert "cannot read the DeepSpeed config" in line


def adam(**params: object) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}


def warmup(**params: object) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupLR", "params": params}}


def zero(**values: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1, **values}}


NVME = {"device": "nvme", "nvme_path": "/nowhere/nvme"}
CONFIG_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    # keys that nothing reads
    "an unknown key": ({"nonsense": 1}, '"nonsense"'),
    "a misspelt key": ({"gradient_cliping": 1.0}, 'did you mean "gradient_clipping"'),
    "a misspelt batch size": ({"train_batchsize": 8}, 'did you mean "train_batch_size"'),
    "a key of another place": ({"stage": 1}, '"stage"'),
    "a misspelt key of ZeRO": (zero(reduce_bucket_sise=1), 'did you mean "reduce_bucket_size"'),
    "a misspelt key of offloading": (
        zero(offload_optimizer={"devise": "cpu"}),
        '"zero_optimization.offload_optimizer.devise"',
    ),
    "a misspelt key of fp16": (
        {"fp16": {"enabled": False, "los_scale": 0}},
        '"fp16.los_scale" in the DeepSpeed config is nothing that DeepSpeed reads; did you mean "loss_scale"?',
    ),
    "a misspelt key of bf16": ({"bf16": {"enable": True}}, 'did you mean "enabled"'),
    "a misspelt key of a monitor": (
        {"tensorboard": {"enabled": False, "outputpath": "x"}},
        'did you mean "output_path"',
    ),
    "a misspelt key of activation checkpointing": (
        {"activation_checkpointing": {"profil": True}},
        '"activation_checkpointing.profil"',
    ),
    "a misspelt key of checkpoints": ({"checkpoint": {"load_univers": True}}, '"checkpoint.load_univers"'),
    "a misspelt key of the profiler": (
        {"flops_profiler": {"profile_steps": 2}},
        'did you mean "profile_step"',
    ),
    "a misspelt parameter of the optimiser": (adam(weight_decoy=0.1), 'did you mean "weight_decay"'),
    "a parameter of DeepSpeed's Adam for torch's": (adam(bias_correction=True), "bias_correction"),
    "clipping in the wrong place": (adam(max_grad_norm=1.0), "max_grad_norm"),
    "a misspelt parameter of the schedule": (warmup(warmup_step=5), "warmup_step"),
    "a key of the optimiser": ({"optimizer": {"type": "AdamW", "lr": 1e-4}}, '"optimizer.lr"'),
    "a key of the schedule": ({"scheduler": {"type": "WarmupLR", "warmup": 5}}, '"scheduler.warmup"'),
    # what DeepSpeed has no more
    "amp": ({"amp": {"enabled": True}}, '"amp"'),
    "amp switched off": ({"amp": {"enabled": False}}, '"amp"'),
    "elastic training": ({"elasticity": {"enabled": True}}, "elasticity"),
    # types of optimiser and schedule
    "a misspelt optimiser": ({"optimizer": {"type": "AdmaW"}}, 'did you mean "AdamW"'),
    "an unknown optimiser": ({"optimizer": {"type": "Gradient Descent"}}, "Gradient Descent"),
    "an optimiser without a type": ({"optimizer": {"params": {}}}, '"type"'),
    "an optimiser of a number": ({"optimizer": {"type": 3}}, '"type"'),
    "an optimiser that ZeRO does not know": ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "SGD"),
    "Lamb under ZeRO": ({"optimizer": {"type": "Lamb"}}, '"stage": 0'),
    "a misspelt schedule": ({"scheduler": {"type": "WarmupDecayLr"}}, 'did you mean "WarmupDecayLR"'),
    "a schedule without a type": ({"scheduler": {"params": {}}}, '"type"'),
    "a schedule that lacks a parameter": ({"scheduler": {"type": "WarmupDecayLR"}}, "total_num_steps"),
    "a schedule that needs a metric": (
        {"scheduler": {"type": "ReduceLROnPlateau"}, "zero_optimization": {"stage": 0}},
        "metrics",
    ),
    "a schedule of torch's under ZeRO": (
        {"scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.9}}},
        "ExponentialLR is torch's",
    ),
    "a schedule that ends too early": (
        {
            "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1e-3, "total_steps": 5}},
            "zero_optimization": {"stage": 0},
        },
        "ends after 5 steps",
    ),
    "a schedule that is 0 throughout": (warmup(warmup_max_lr=0.0), "learning rate of 0"),
    "a learning rate of 0 in the schedule's first steps": (
        {
            "scheduler": {
                "type": "WarmupDecayLR",
                "params": {
                    "warmup_num_steps": 10,
                    "total_num_steps": 2,
                    "warmup_min_lr": 0,
                    "warmup_max_lr": 0,
                },
            }
        },
        "learning rate of 0",
    ),
    "sums in fp32 without ZeRO": (
        {**zero(stage=0), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        '"data_types.grad_accum_dtype"',
    ),
    "an unknown type for sums": (
        {"data_types": {"grad_accum_dtype": "fp8"}},
        '"data_types.grad_accum_dtype"',
    ),
    # values
    "a section that is a list": ({"optimizer": []}, '"optimizer"'),
    "a section that is null": ({"fp16": None}, '"fp16"'),
    "a section that is auto": ({"scheduler": "auto"}, '"scheduler"'),
    "ZeRO as a switch": ({"zero_optimization": True}, '"zero_optimization"'),
    "offloading as a word": (zero(offload_optimizer="cpu"), '"zero_optimization.offload_optimizer"'),
    "parameters that are a list": ({"optimizer": {"type": "AdamW", "params": [1]}}, '"optimizer.params"'),
    "a monitor that is a word": ({"wandb": "yes"}, '"wandb"'),
    "stage 4": (zero(stage=4), "0, 1, 2 or 3"),
    "stage -1": (zero(stage=-1), "0, 1, 2 or 3"),
    "a stage in words": (zero(stage="one"), "0, 1, 2 or 3"),
    "a stage of true": (zero(stage=True), "0, 1, 2 or 3"),
    "a bucket in words": (zero(reduce_bucket_size="big"), '"zero_optimization.reduce_bucket_size"'),
    "a bucket of nothing": (zero(reduce_bucket_size=0), '"zero_optimization.reduce_bucket_size"'),
    "offloading to a disk that is not there": (zero(stage=3, offload_optimizer=NVME), "/nowhere/nvme"),
    "offloading to nowhere": (zero(offload_optimizer={"device": "moon"}), "offload_optimizer.device"),
    "a negative batch": ({"train_batch_size": -8}, '"train_batch_size"'),
    "a batch of 0": ({"train_batch_size": 0}, '"train_batch_size"'),
    "a batch in words": ({"train_batch_size": "32"}, '"train_batch_size"'),
    "a negative micro-batch": ({"train_micro_batch_size_per_gpu": -1}, '"train_micro_batch_size_per_gpu"'),
    "half an accumulation step": ({"gradient_accumulation_steps": 0.5}, '"gradient_accumulation_steps"'),
    "a batch equation that does not hold": (
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3},
        "is not micro-batch 8 x 3",
    ),
    "auto for the stage": (zero(stage="auto"), '"auto" has no meaning for "zero_optimization.stage"'),
    "auto for the loss scale": ({"fp16": {"loss_scale": "auto"}}, '"fp16.loss_scale"'),
    "auto for a precision": ({"bf16": {"enabled": "auto"}}, '"bf16.enabled"'),
    "two precisions": ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "choose one"),
    "two precisions by an old name": (
        {"fp16": {"enabled": True}, "bfloat16": {"enabled": True}},
        "choose one",
    ),
    "a precision of 1": ({"fp16": {"enabled": 1}}, '"fp16.enabled"'),
    "a negative loss scale": ({"fp16": {"enabled": False, "loss_scale": -1}}, '"fp16.loss_scale"'),
    "clipping in words": ({"gradient_clipping": "five"}, '"gradient_clipping"'),
    "negative clipping": ({"gradient_clipping": -1.0}, '"gradient_clipping"'),
    "a switch in words": ({"dump_state": "no"}, '"dump_state"'),
    "a step count in words": ({"steps_per_print": "ten"}, '"steps_per_print"'),
    "an unknown data type": ({"communication_data_type": "fp8"}, '"communication_data_type"'),
    "a learning rate in words": (adam(lr="fast"), '"optimizer.params"'),
    "a negative learning rate": (adam(lr=-1e-4), "learning rate"),
    "one beta": (adam(betas=[0.9]), '"optimizer.params"'),
    "three betas": (adam(betas=[0.9, 0.95, 0.99]), '"optimizer.params"'),
    "a beta of 2": (adam(betas=[0.9, 2.0]), "beta"),
    "a warm-up in words": (warmup(warmup_num_steps="some"), '"scheduler.params"'),
    "a negative warm-up": (warmup(warmup_num_steps=-5), '"scheduler.params"'),
    "an unknown kind of warm-up": (warmup(warmup_type="cosine"), "log or linear"),
    "a peak in words": (warmup(warmup_max_lr="high"), '"scheduler.params"'),
}


@pytest.mark.parametrize("name", CONFIG_VALUES)
def test_a_value_of_a_config(inputs: Inputs, refused: Refused, name: str) -> None:
    changes, named = CONFIG_VALUES[name]
    path = inputs.folder / "config.json"
    path.write_text(json.dumps({**json.loads(CPU_CONFIG.read_text()), **changes}))
    assert named in refused(inputs.command(deepspeed_config=path))


def without_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let importing a package fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("monitor", "package", "named"),
    [
        ("wandb", "wandb", "pip install 'distilspeed[monitors]'"),
        ("tensorboard", "tensorboard", "pip install 'distilspeed[monitors]'"),
        ("comet", "comet_ml", "pip install 'comet_ml>=3.41.0'"),
    ],
)
def test_a_monitor_without_its_package(
    inputs: Inputs, refused: Refused, monkeypatch: pytest.MonkeyPatch, monitor: str, package: str, named: str
) -> None:
    without_package(package, monkeypatch)
    path = inputs.folder / "config.json"
    path.write_text(json.dumps({**json.loads(CPU_CONFIG.read_text()), monitor: {"enabled": True}}))
    line = refused(inputs.command(deepspeed_config=path))
    assert f'"{monitor}"' in line
    assert named in line
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # DeepSpeed makes monitors on rank 0 alone
    with pytest.raises(pytest.fail.Exception, match="the training started"):
        refused(inputs.command(deepspeed_config=path))


@pytest.mark.parametrize("monitor", ["csv_monitor", "tensorboard"])
@pytest.mark.parametrize("path", ["file", "file/logs", "loop"])
def test_a_monitor_that_cannot_write(inputs: Inputs, refused: Refused, monitor: str, path: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "loop").symlink_to("loop")
    section = {"enabled": True, "output_path": str(inputs.folder / path)}
    config = inputs.folder / "config.json"
    config.write_text(json.dumps({**json.loads(CPU_CONFIG.read_text()), monitor: section}))
    assert f'"{monitor}.output_path"' in refused(inputs.command(deepspeed_config=config))


def test_fp16_on_a_device_without_it(
    inputs: Inputs, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    path = inputs.folder / "config.json"
    path.write_text('{"fp16": {"enabled": true}}')
    assert "cannot train in fp16" in refused(inputs.command(deepspeed_config=path))


def test_a_learning_rate_that_the_config_contradicts(inputs: Inputs, refused: Refused) -> None:
    path = inputs.folder / "config.json"
    path.write_text(json.dumps(adam(lr=1e-3)))
    line = refused(inputs.command("--learning_rate", "1e-4", deepspeed_config=path))
    assert "--learning_rate 0.0001 contradicts" in line


# --- corpora --------------------------------------------------------------------------------------------


def flip(name: str) -> Damage:
    """Change one bit in the middle of a file."""

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
    """Replace values at the top of a JSON file."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return damage


def vouch(folder: Path) -> None:
    """Make the manifest agree with the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["files"]:
        content = (folder / record["path"]).read_bytes()
        record |= {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_train_rows(change: Callable[[datasets.Dataset], datasets.Dataset]) -> Damage:
    """Replace the training rows; the manifest vouches for the new ones."""

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


DAMAGED = "is damaged: "
CORPORA: dict[str, tuple[Damage, str]] = {
    **{
        f"a flipped bit in {name}": (flip(name), f"the content of {name} has changed")
        for name in (
            "train/data.arrow",
            "held_out/data.arrow",
            "token_counts.npy",
            "tokenizer/tokenizer.json",
        )
    },
    **{
        f"a flipped bit in {name}": (flip(name), DAMAGED)
        for name in ("train/state.json", "train/dataset_info.json")
    },
    **{
        f"no {name}": (without(name), f"{name} is missing")
        for name in (
            "train/data.arrow",
            "held_out/state.json",
            "token_counts.npy",
            "tokenizer/tokenizer.json",
        )
    },
    "no manifest": (without("manifest.json"), "is not a prepared corpus"),
    "no training rows' folder": (lambda folder: shutil.rmtree(folder / "train"), "is missing"),
    "half the rows": (shortened("train/data.arrow"), "bytes instead of"),
    "half the manifest": (shortened("manifest.json"), DAMAGED),
    "an empty manifest": (with_text("manifest.json", ""), DAMAGED),
    "a manifest that is a list": (with_text("manifest.json", "[]"), DAMAGED),
    "a manifest nested deeply": (with_text("manifest.json", "[" * 100_000), DAMAGED),
    "a foreign format": (with_values("manifest.json", format_version=2), "corpus format 2"),
    "a format in words": (with_values("manifest.json", format_version="1"), "corpus format 1"),
    "a vocabulary in words": (with_values("manifest.json", vocab_size="many"), "vocab_size"),
    "rows of null": (with_values("manifest.json", seq_length=None), "seq_length"),
    "rows of another length": (with_values("manifest.json", seq_length=32), "64 tokens instead of 32"),
    "a mask token beyond the vocabulary": (with_values("manifest.json", mask_id=99999), "special tokens"),
    "counts that are a list": (with_values("manifest.json", counts=[]), "counts"),
    "files that are a number": (with_values("manifest.json", files=3), "files"),
    "a smaller vocabulary": (with_values("manifest.json", vocab_size=500), "token_counts.npy"),
    "a token beyond the vocabulary": (with_train_rows(beyond_the_vocabulary), "train has token id 60000"),
    "no training rows": (with_train_rows(lambda rows: rows.select([])), "no training rows"),
    "rows without their lengths": (
        with_train_rows(lambda rows: rows.remove_columns("real_tokens")),
        "real_tokens",
    ),
    "token counts of another vocabulary": (shuffled_counts, "token_counts.npy"),
    "token counts that are a pickle": (pickled_counts, DAMAGED),
    "another tokenizer": (with_values("manifest.json", tokenizer_hash="0" * 64), "another tokenizer"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, named = CORPORA[name]
    corpus = inputs.folder / "corpus"
    shutil.copytree(inputs.corpus, corpus)
    damage(corpus)
    assert named in refused(inputs.command(data_dir=corpus))


@pytest.mark.parametrize("path", ["absent", "file", "loop", "file/corpus", "empty"])
def test_a_path_that_is_no_corpus(inputs: Inputs, refused: Refused, path: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "empty").mkdir()
    (inputs.folder / "loop").symlink_to("loop")
    assert f"{inputs.folder / path}" in refused(inputs.command(data_dir=inputs.folder / path))


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


def gpt2(folder: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)


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
    """Another tokenizer of the same size, in vocab.txt alone."""
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    pieces[-2:] = reversed(pieces[-2:])
    for file in folder.glob("*token*"):
        file.unlink()
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")


LOAD = "cannot load the teacher"
CONFIGS_OF_MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (without("config.json"), "cannot load"),
    "a config that is not JSON": (with_text("config.json", "{"), "cannot load"),
    "an empty config": (with_text("config.json", ""), "cannot load"),
    "a config that is a list": (with_text("config.json", "[]"), "cannot load"),
    "a config without an architecture": (with_text("config.json", "{}"), "cannot load"),
    "an unknown architecture": (with_values("config.json", model_type="mine"), "cannot load"),
    "code from the hub": (
        with_text("config.json", '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}'),
        "cannot load",
    ),
    "a hidden size in words": (with_values("config.json", hidden_size="wide"), "(value: 'wide')"),
    "heads that do not divide": (with_values("config.json", num_attention_heads=3), "heads"),
    "no heads": (with_values("config.json", num_attention_heads=0), "cannot load"),
    "no layers": (with_values("config.json", num_hidden_layers=0), "layers"),
    "negative layers": (with_values("config.json", num_hidden_layers=-2), "layers"),
    "an unknown activation": (with_values("config.json", hidden_act="gelu_mine"), "cannot load"),
    "a negative dropout": (with_values("config.json", hidden_dropout_prob=-0.5), "dropout"),
    "dropout in words": (with_values("config.json", hidden_dropout_prob="some"), "dropout"),
}
TEACHERS: dict[str, tuple[Damage, str]] = {
    **CONFIGS_OF_MODELS,
    "no weights": (without("model.safetensors"), LOAD),
    "pickled weights alone": (pickled, ".save_pretrained(FOLDER)"),
    "empty weights": (with_text("model.safetensors", ""), LOAD),
    "half the weights": (shortened("model.safetensors"), LOAD),
    "weights that are text": (with_text("model.safetensors", "not safetensors" * 100), LOAD),
    "a header that is too long": (with_text("model.safetensors", "\x7f" * 64), LOAD),
    "a NaN": (with_value(float("nan")), "layer.2.output.dense.weight"),
    "an infinity": (with_value(float("-inf")), "layer.2.output.dense.weight"),
    "a layer missing": (
        with_weights(lambda weights: weights.pop("bert.encoder.layer.1.output.dense.bias")),
        "layer.1.output.dense.bias",
    ),
    "more layers than weights": (with_values("config.json", num_hidden_layers=6), "lacks weights"),
    "weights of another width": (
        with_values("config.json", intermediate_size=128),
        "intermediate.dense.bias of shape [64], and its config.json says [128]",
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
        "rows of 64 tokens",
    ),
    "GPT-2": (gpt2, "gpt2"),
    "an encoder without a head": (encoder_alone, "lacks weights"),
    "a decoder": (with_values("config.json", is_decoder=True), "is_decoder"),
    "another epsilon": (with_values("config.json", layer_norm_eps=1e-5), "layer_norm_eps"),
    "a tokenizer that is not JSON": (with_text("tokenizer.json", "{"), "tokenizer"),
    "a tokenizer without a mask token": (without_mask_token, "another tokenizer"),
    "a tokenizer with a token more": (with_another_token, "another tokenizer"),
    "another tokenizer in vocab.txt alone": (vocabulary_alone, "another tokenizer"),
    "a tokenizer without its vocabulary": (without("tokenizer.json"), "has no vocabulary"),
    "tied weights that are said to be untied": (
        with_values("config.json", tie_word_embeddings=False),
        "lacks cls.predictions.decoder.bias, cls.predictions.decoder.weight,",
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, named = TEACHERS[name]
    teacher = inputs.folder / "teacher"
    shutil.copytree(inputs.teacher, teacher)
    damage(teacher)
    assert named in refused(inputs.command(teacher=teacher))


@pytest.mark.parametrize("name", CONFIGS_OF_MODELS)
def test_a_students_config(inputs: Inputs, refused: Refused, name: str) -> None:
    damage, named = CONFIGS_OF_MODELS[name]
    student = inputs.folder / "student"
    shutil.copytree(inputs.teacher, student)
    damage(student)
    line = refused(inputs.command("--student_config", student, teacher="none"))
    assert named in line or "--student_config" in line


@pytest.mark.parametrize("path", ["absent", "file", "loop", "empty"])
@pytest.mark.parametrize("role", ["teacher", "student_config"])
def test_a_path_that_is_no_model(inputs: Inputs, refused: Refused, role: str, path: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "empty").mkdir()
    (inputs.folder / "loop").symlink_to("loop")
    given = {"teacher": "none"} | {role: inputs.folder / path}
    assert f"cannot load the {'teacher' if role == 'teacher' else 'student'}" in refused(
        inputs.command(**given)
    )


# --- output folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["file", "file/run", "loop", "loop/run", "occupied", "dangling"])
def test_an_output_folder_that_is_taken(inputs: Inputs, refused: Refused, path: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "loop").symlink_to("loop")
    (inputs.folder / "dangling").symlink_to("nowhere")
    (inputs.folder / "occupied").mkdir()
    (inputs.folder / "occupied" / "notes.txt").write_text("mine")
    assert f"{inputs.folder / path}" in refused(inputs.command(output_dir=inputs.folder / path))


@pytest.mark.parametrize("role", ["teacher", "data_dir"])
@pytest.mark.parametrize("below", [".", "run"])
def test_an_output_folder_among_the_inputs(inputs: Inputs, refused: Refused, role: str, below: str) -> None:
    folder = inputs.folder / role
    shutil.copytree(inputs.teacher if role == "teacher" else inputs.corpus, folder)
    line = refused(inputs.command("--resume", **{role: folder, "output_dir": folder / below}))
    assert f"is inside --{role}" in line


def test_an_output_folder_that_cannot_be_written(
    inputs: Inputs, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != inputs.folder)  # root may write everywhere
    assert "cannot be written" in refused(inputs.command())
