"""Every key that DeepSpeed reads is accepted; any other key is refused with a suggestion."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedsOwn
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from user_errors import raises_user_error

from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.engine.config_auto import resolve_deepspeed_config
from distilspeed.trainer.engine.config_batch import resolve_batch_equation
from distilspeed.trainer.engine.config_check import check_deepspeed_config

GOOD: dict[str, Any] = json.loads(
    (Path(__file__).parents[3] / "ds_configs" / "cpu.json").read_text(encoding="utf-8")
)
# Every section and kind of value that DeepSpeed's documentation shows for training.
DOCUMENTED: dict[str, Any] = {
    "steps_per_print": 100,
    "wall_clock_breakdown": False,
    "memory_breakdown": False,
    "dump_state": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean",
    "communication_data_type": "fp32",
    "seq_parallel_communication_data_type": "fp32",
    "disable_allgather": False,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "dataloader_drop_last": False,
    "gradient_clipping": 1,
    "vocabulary_size": 30592,
    "bf16": {"enabled": True, "immediate_grad_update": True},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": ["a.B"]},
    "tensorboard": {"enabled": True, "output_path": "logs", "job_name": "run"},
    "wandb": {"enabled": False, "group": "g", "team": "t", "project": "p"},
    "csv_monitor": {"enabled": False, "output_path": "logs", "job_name": "run"},
    "comet": {"enabled": False, "project": "p", "samples_log_interval": 10},
    "flops_profiler": {
        "enabled": False,
        "recompute_fwd_factor": 0.5,
        "profile_step": 2,
        "module_depth": -1,
        "top_modules": 3,
        "detailed": True,
        "output_file": "flops.txt",
    },
    "comms_logger": {"enabled": False, "verbose": False, "prof_all": True, "prof_ops": ["all_reduce"]},
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "number_checkpoints": 2,
        "synchronize_checkpoint_boundary": False,
        "profile": False,
    },
    "aio": {"block_size": 131072, "queue_depth": 16, "single_submit": False, "overlap_events": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "checkpoint": {"tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False},
    "timers": {"throughput": {"enabled": True, "synchronized": False}},
    "compile": {"deepcompile": False},
    "data_efficiency": {"enabled": False, "seed": 1, "data_sampling": {"enabled": False}},
    "autotuning": {"enabled": False, "metric": "latency"},
    "hybrid_engine": {"enabled": False},
    "sequence_parallel_size": 1,
    "data_parallel_size": 1,
}


def check(changes: dict[str, Any]) -> None:
    config = DeepSpeedConfig({**GOOD, **changes})
    check_deepspeed_config(
        resolve_deepspeed_config(config, resolve_batch_equation(config, 4), 100, None), 100
    )


def test_every_documented_key_is_accepted() -> None:
    check(DOCUMENTED)
    for name, value in DOCUMENTED.items():
        check({name: value})


@pytest.mark.parametrize(
    ("section", "model"), [("zero_optimization", DeepSpeedZeroConfig), ("fp16", DeepSpeedFP16Config)]
)
def test_every_key_of_a_pydantic_model_is_accepted(section: str, model: type[DeepSpeedConfigModel]) -> None:
    deprecated = {
        name
        for name, field in model.model_fields.items()
        if (field.json_schema_extra or {}).get("deprecated")
    }
    for by_alias in (True, False):
        values = model().model_dump(mode="json", by_alias=by_alias, exclude_none=True, exclude=deprecated)
        assert len(values) > 5
        check({section: values})


@pytest.mark.parametrize(
    "optimizer",
    [
        {"type": "adamw", "params": {"lr": 1e-4, "torch_adam": True, "adam_w_mode": True, "foreach": True}},
        {"type": "Adam", "params": {"adam_w_mode": False, "bias_correction": True}},
        {"type": "AdamW", "params": {"fp32_optimizer_states": True}},
        {"type": "Adagrad", "params": {"lr": 1e-2, "eps": 1e-10}},
        {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}},
        {"type": "Muon", "params": {"muon_lr": 1e-3}},
    ],
    ids=str,
)
def test_the_optimizers_of_deepspeed_are_accepted(optimizer: dict[str, Any]) -> None:
    check({"optimizer": optimizer})


@pytest.mark.parametrize(
    "scheduler",
    [
        {"type": "WarmupLR"},
        {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_type": "log"}},
        {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto", "cos_min_ratio": 0.1}},
        {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}},
        {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-5}},
        {"type": "CosineAnnealingLR", "params": {"T_max": 100}},
        {"type": "OneCycleLR", "params": {"max_lr": 1e-3, "total_steps": 100}},
    ],
    ids=str,
)
def test_the_schedules_of_deepspeed_and_torch_are_accepted(scheduler: dict[str, Any]) -> None:
    of_torch = scheduler["type"].endswith(("AnnealingLR", "CycleLR"))
    check({"scheduler": scheduler} | ({"zero_optimization": {"stage": 0}} if of_torch else {}))


def test_the_check_does_not_change_the_config() -> None:
    config = DeepSpeedConfig({**GOOD, **DOCUMENTED})
    resolved = resolve_deepspeed_config(config, resolve_batch_equation(config, 4), 100, None)
    before = json.dumps(resolved.to_dict())
    check_deepspeed_config(resolved, 100)
    assert json.dumps(resolved.to_dict()) == before
    assert type(resolved.to_dict()["tensorboard"]) is dict


@pytest.mark.parametrize("section", [name for name, value in DOCUMENTED.items() if isinstance(value, dict)])
def test_an_unknown_key_is_refused_in_every_section(section: str) -> None:
    with raises_user_error("unknown-config-key", f'"{section}.', 'nonsense"'):
        check({section: DOCUMENTED[section] | {"nonsense": 1}})


def test_a_misspelt_key_that_deepspeed_ignores_is_refused() -> None:
    """DeepSpeed silently ignores a misspelt key, which is the reason for the check."""
    misspelt = {"train_batch_size": 8, "gradient_cliping": 5.0}
    assert DeepSpeedsOwn(misspelt).gradient_clipping == 1.0
    with raises_user_error("unknown-config-key", '"gradient_cliping"', '"gradient_clipping"'):
        check(misspelt | {"train_batch_size": "auto"})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled"),
        ({"fp16": {"enabled": False, "auto_cast": True}}, "fp16.auto_cast"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
    ],
    ids=str,
)
def test_a_setting_that_would_change_what_a_step_computes_is_refused(
    section: dict[str, Any], key: str
) -> None:
    with raises_user_error("bad-config", f'"{key}"', "supported"):
        check(section)
