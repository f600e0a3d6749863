"""Bad DeepSpeed configs for launch/train.py: status 2 and one line, and the folder stays unchanged."""

import json
import sys
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator
from launcher import CPU_CONFIG
from refusals import Inputs, Refused
from user_errors import assert_names

CONFIG_FILES: dict[str, tuple[bytes, str, *tuple[str, ...]]] = {
    "not JSON": (b"{", "unreadable-config"),
    "empty": (b"", "unreadable-config"),
    "not UTF-8": (b'{"train_batch_size": "\xff"}', "unreadable-config"),
    "a comment": (b"{} // mine", "unreadable-config"),
    "a trailing comma": (b'{"train_batch_size": 8,}', "unreadable-config"),
    "an array": (b"[1, 2]", "bad-config"),
    "a string": (b'"auto"', "bad-config"),
    "a key twice": (
        b'{"train_batch_size": 8, "train_batch_size": 16}',
        "unreadable-config",
        '"train_batch_size"',
    ),
    "a key twice in a section": (
        b'{"zero_optimization": {"stage": 1, "stage": 2}}',
        "unreadable-config",
        '"stage"',
    ),
    "NaN": (b'{"gradient_clipping": NaN}', "unreadable-config", "NaN"),
    "Infinity": (b'{"gradient_clipping": Infinity}', "unreadable-config", "Infinity"),
    "a number that overflows": (b'{"gradient_clipping": 1e999}', "unreadable-config", "1e999"),
    "an endless number": (b'{"train_batch_size": ' + b"9" * 5000 + b"}", "unreadable-config", "5000"),
    "a huge number": (b'{"train_batch_size": ' + b"9" * 400 + b"}", "unreadable-config", "400"),
    "deeply nested": (
        b'{"zero_optimization": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "unreadable-config",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_config_file(inputs: Inputs, refused: Refused, name: str) -> None:
    content, code, *named = CONFIG_FILES[name]
    path = inputs.folder / "config.json"
    path.write_bytes(content)
    assert_names(refused(inputs.command(deepspeed_config=path)), code, str(path), *named)


@pytest.mark.parametrize("name", ["absent.json", ".", "file/config.json", "loop"])
def test_an_unreadable_config(inputs: Inputs, refused: Refused, name: str) -> None:
    (inputs.folder / "file").touch()
    (inputs.folder / "loop").symlink_to("loop")
    path = inputs.folder / name
    assert_names(refused(inputs.command(deepspeed_config=path)), "unreadable-config", str(path))


def adam(**params: object) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, **params}}}


def warmup(**params: object) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupLR", "params": params}}


def zero(**values: object) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1, **values}}


NVME = {"device": "nvme", "nvme_path": "/nowhere/nvme"}
CONFIG_VALUES: dict[str, tuple[dict[str, Any], str, *tuple[str, ...]]] = {
    # unknown keys
    "an unknown key": ({"nonsense": 1}, "unknown-config-key", '"nonsense"'),
    "a misspelt key": (
        {"gradient_cliping": 1.0},
        "unknown-config-key",
        '"gradient_cliping"',
        '"gradient_clipping"',
    ),
    "a misspelt batch size": (
        {"train_batchsize": 8},
        "unknown-config-key",
        '"train_batchsize"',
        '"train_batch_size"',
    ),
    "a key of another place": ({"stage": 1}, "unknown-config-key", '"stage"'),
    "a misspelt key of ZeRO": (
        zero(reduce_bucket_sise=1),
        "unknown-config-key",
        '"zero_optimization.reduce_bucket_sise"',
        '"reduce_bucket_size"',
    ),
    "a misspelt key of offloading": (
        zero(offload_optimizer={"devise": "cpu"}),
        "unknown-config-key",
        '"zero_optimization.offload_optimizer.devise"',
        '"device"',
    ),
    "a misspelt key of fp16": (
        {"fp16": {"enabled": False, "los_scale": 0}},
        "unknown-config-key",
        '"fp16.los_scale"',
        '"loss_scale"',
    ),
    "a misspelt key of bf16": (
        {"bf16": {"enable": True}},
        "unknown-config-key",
        '"bf16.enable"',
        '"enabled"',
    ),
    "a misspelt key of a monitor": (
        {"tensorboard": {"enabled": False, "outputpath": "x"}},
        "unknown-config-key",
        '"tensorboard.outputpath"',
        '"output_path"',
    ),
    "a misspelt key of activation checkpointing": (
        {"activation_checkpointing": {"profil": True}},
        "unknown-config-key",
        '"activation_checkpointing.profil"',
        '"profile"',
    ),
    "a misspelt key of checkpoints": (
        {"checkpoint": {"load_univers": True}},
        "unknown-config-key",
        '"checkpoint.load_univers"',
        '"load_universal"',
    ),
    "a misspelt key of the profiler": (
        {"flops_profiler": {"profile_steps": 2}},
        "unknown-config-key",
        '"flops_profiler.profile_steps"',
        '"profile_step"',
    ),
    "a misspelt parameter of the optimiser": (
        adam(weight_decoy=0.1),
        "unknown-config-key",
        '"optimizer.params.weight_decoy"',
        '"weight_decay"',
    ),
    "a parameter of DeepSpeed's Adam for torch's": (
        adam(bias_correction=True),
        "unknown-config-key",
        '"optimizer.params.bias_correction"',
    ),
    "clipping in the wrong place": (
        adam(max_grad_norm=1.0),
        "unknown-config-key",
        '"optimizer.params.max_grad_norm"',
    ),
    "a misspelt parameter of the schedule": (
        warmup(warmup_step=5),
        "unknown-config-key",
        '"scheduler.params.warmup_step"',
    ),
    "a key of the optimiser": (
        {"optimizer": {"type": "AdamW", "lr": 1e-4}},
        "unknown-config-key",
        '"optimizer.lr"',
    ),
    "a key of the schedule": (
        {"scheduler": {"type": "WarmupLR", "warmup": 5}},
        "unknown-config-key",
        '"scheduler.warmup"',
    ),
    # features that DeepSpeed no longer has
    "amp": ({"amp": {"enabled": True}}, "bad-config", '"amp"'),
    "amp switched off": ({"amp": {"enabled": False}}, "bad-config", '"amp"'),
    "elastic training": ({"elasticity": {"enabled": True}}, "bad-config", '"elasticity"'),
    # optimisers and schedules
    "a misspelt optimiser": (
        {"optimizer": {"type": "AdmaW"}},
        "unsupported-optimizer",
        '"optimizer.type"',
        "'AdmaW'",
        '"AdamW"',
    ),
    "an unknown optimiser": (
        {"optimizer": {"type": "Gradient Descent"}},
        "unsupported-optimizer",
        '"optimizer.type"',
        "'Gradient Descent'",
    ),
    "an optimiser without a type": ({"optimizer": {"params": {}}}, "bad-config", '"type"'),
    "an optimiser of a number": ({"optimizer": {"type": 3}}, "bad-config", '"type"'),
    "an optimiser that ZeRO does not know": (
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        "unsupported-optimizer",
        "SGD",
        '"stage": 0',
        '"zero_allow_untested_optimizer": true',
    ),
    "Lamb under ZeRO": ({"optimizer": {"type": "Lamb"}}, "conflicting-config", "Lamb", '"stage": 0'),
    "a misspelt schedule": (
        {"scheduler": {"type": "WarmupDecayLr"}},
        "unsupported-scheduler",
        '"scheduler.type"',
        "'WarmupDecayLr'",
        '"WarmupDecayLR"',
    ),
    "a schedule without a type": ({"scheduler": {"params": {}}}, "bad-config", '"type"'),
    "a schedule without a parameter": (
        {"scheduler": {"type": "WarmupDecayLR"}},
        "bad-config",
        '"scheduler.params"',
        "total_num_steps",
    ),
    "a schedule that needs a metric": (
        {"scheduler": {"type": "ReduceLROnPlateau"}, "zero_optimization": {"stage": 0}},
        "bad-config",
        '"scheduler.params"',
        "metrics",
    ),
    "a schedule of torch's under ZeRO": (
        {"scheduler": {"type": "ExponentialLR", "params": {"gamma": 0.9}}},
        "unsupported-scheduler",
        "ExponentialLR",
        "WarmupDecayLR",
    ),
    "a schedule that ends too early": (
        {
            "scheduler": {"type": "OneCycleLR", "params": {"max_lr": 1e-3, "total_steps": 5}},
            "zero_optimization": {"stage": 0},
        },
        "unsuitable-schedule",
        "OneCycleLR",
        "5",
        '"scheduler.params.total_steps"',
        "203",
    ),
    "a schedule that is 0 throughout": (warmup(warmup_max_lr=0.0), "unsuitable-schedule", "WarmupLR", "203"),
    "a schedule that ends before the run": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 100}}},
        "unsuitable-schedule",
        "WarmupDecayLR",
        "100",
        "203",
    ),
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
        "unsuitable-schedule",
        "WarmupDecayLR",
        "203",
    ),
    "sums in fp32 without ZeRO": (
        {**zero(stage=0), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        "conflicting-config",
        '"data_types.grad_accum_dtype"',
    ),
    "an unknown type for sums": (
        {"data_types": {"grad_accum_dtype": "fp8"}},
        "bad-config",
        '"data_types.grad_accum_dtype"',
    ),
    # values
    "a section that is a list": ({"optimizer": []}, "bad-config", '"optimizer"'),
    "a section that is null": ({"fp16": None}, "bad-config", '"fp16"'),
    "a section that is auto": ({"scheduler": "auto"}, "bad-config", '"scheduler"'),
    "ZeRO as a switch": ({"zero_optimization": True}, "bad-config", '"zero_optimization"'),
    "offloading as a word": (
        zero(offload_optimizer="cpu"),
        "bad-config",
        '"zero_optimization.offload_optimizer"',
    ),
    "parameters that are a list": (
        {"optimizer": {"type": "AdamW", "params": [1]}},
        "bad-config",
        '"optimizer.params"',
    ),
    "a monitor that is a word": ({"wandb": "yes"}, "bad-config", '"wandb"'),
    "stage 4": (zero(stage=4), "bad-config", '"zero_optimization.stage"', "4"),
    "stage -1": (zero(stage=-1), "bad-config", '"zero_optimization.stage"', "-1"),
    "a stage in words": (zero(stage="one"), "bad-config", '"zero_optimization.stage"', "'one'"),
    "a stage of true": (zero(stage=True), "bad-config", '"zero_optimization.stage"', "True"),
    "a bucket in words": (
        zero(reduce_bucket_size="big"),
        "bad-config",
        '"zero_optimization.reduce_bucket_size"',
    ),
    "a bucket of nothing": (
        zero(reduce_bucket_size=0),
        "bad-config",
        '"zero_optimization.reduce_bucket_size"',
    ),
    "offloading to a disk that is not there": (
        zero(stage=3, offload_optimizer=NVME),
        "bad-config",
        '"zero_optimization.offload_optimizer"',
        "/nowhere/nvme",
    ),
    "offloading to nowhere": (
        zero(offload_optimizer={"device": "moon"}),
        "bad-config",
        '"zero_optimization.offload_optimizer.device"',
        "'moon'",
    ),
    "a negative batch": ({"train_batch_size": -8}, "bad-config", '"train_batch_size"'),
    "a batch of 0": ({"train_batch_size": 0}, "bad-config", '"train_batch_size"'),
    "a batch in words": ({"train_batch_size": "32"}, "bad-config", '"train_batch_size"'),
    "a negative micro-batch": (
        {"train_micro_batch_size_per_gpu": -1},
        "bad-config",
        '"train_micro_batch_size_per_gpu"',
    ),
    "half an accumulation step": (
        {"gradient_accumulation_steps": 0.5},
        "bad-config",
        '"gradient_accumulation_steps"',
    ),
    "a batch equation that does not hold": (
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3},
        "indivisible-batch",
        "32",
        "24",
        '"auto"',
    ),
    "auto for the stage": (zero(stage="auto"), "bad-config", '"zero_optimization.stage"', '"auto"'),
    "auto for the loss scale": ({"fp16": {"loss_scale": "auto"}}, "bad-config", '"fp16.loss_scale"'),
    "auto for a precision": ({"bf16": {"enabled": "auto"}}, "bad-config", '"bf16.enabled"'),
    "two precisions": (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "conflicting-config",
        '"fp16"',
        '"bf16"',
    ),
    "two precisions by an old name": (
        {"fp16": {"enabled": True}, "bfloat16": {"enabled": True}},
        "conflicting-config",
        '"fp16"',
        '"bf16"',
    ),
    "a precision of 1": ({"fp16": {"enabled": 1}}, "bad-config", '"fp16.enabled"'),
    "a negative loss scale": (
        {"fp16": {"enabled": False, "loss_scale": -1}},
        "bad-config",
        '"fp16.loss_scale"',
    ),
    "clipping in words": ({"gradient_clipping": "five"}, "bad-config", '"gradient_clipping"'),
    "negative clipping": ({"gradient_clipping": -1.0}, "bad-config", '"gradient_clipping"'),
    "a switch in words": ({"dump_state": "no"}, "bad-config", '"dump_state"'),
    "a step count in words": ({"steps_per_print": "ten"}, "bad-config", '"steps_per_print"'),
    "an unknown data type": ({"communication_data_type": "fp8"}, "bad-config", '"communication_data_type"'),
    "a learning rate in words": (adam(lr="fast"), "bad-config", '"optimizer.params"'),
    "a negative learning rate": (adam(lr=-1e-4), "bad-config", '"optimizer.params"', "-0.0001"),
    "one beta": (adam(betas=[0.9]), "bad-config", '"optimizer.params"'),
    "three betas": (adam(betas=[0.9, 0.95, 0.99]), "bad-config", '"optimizer.params"'),
    "a beta of 2": (adam(betas=[0.9, 2.0]), "bad-config", '"optimizer.params"', "2.0"),
    "a warm-up in words": (warmup(warmup_num_steps="some"), "bad-config", '"scheduler.params"'),
    "a negative warm-up": (warmup(warmup_num_steps=-5), "bad-config", '"scheduler.params"'),
    "an unknown kind of warm-up": (
        warmup(warmup_type="cosine"),
        "bad-config",
        '"scheduler.params.warmup_type"',
        "'cosine'",
        "log",
        "linear",
    ),
    "a peak in words": (warmup(warmup_max_lr="high"), "bad-config", '"scheduler.params"'),
}


@pytest.mark.parametrize("name", CONFIG_VALUES)
def test_a_value_of_a_config(inputs: Inputs, refused: Refused, name: str) -> None:
    changes, code, *named = CONFIG_VALUES[name]
    path = inputs.folder / "config.json"
    path.write_text(json.dumps({**json.loads(CPU_CONFIG.read_text()), **changes}))
    assert_names(refused(inputs.command(deepspeed_config=path)), code, *named)


def without_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the import of a package fail, as if it were not installed."""
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
    assert_names(line, "missing-package", f'"{monitor}"', named)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # DeepSpeed makes monitors only on rank 0
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
    line = refused(inputs.command(deepspeed_config=config))
    assert_names(
        line, "unwritable-output", f'"{monitor}.output_path"', str(inputs.folder / path.split("/")[0])
    )


def test_fp16_on_a_device_without_it(
    inputs: Inputs, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    path = inputs.folder / "config.json"
    path.write_text('{"fp16": {"enabled": true}}')
    assert_names(refused(inputs.command(deepspeed_config=path)), "unsupported-precision", "fp16", '"bf16"')


def test_a_learning_rate_that_contradicts_the_config(inputs: Inputs, refused: Refused) -> None:
    path = inputs.folder / "config.json"
    path.write_text(json.dumps(adam(lr=1e-3)))
    line = refused(inputs.command("--learning_rate", "1e-4", deepspeed_config=path))
    assert_names(
        line, "conflicting-config", "--learning_rate 0.0001", '"optimizer.params.lr": 0.001', '"auto"'
    )
