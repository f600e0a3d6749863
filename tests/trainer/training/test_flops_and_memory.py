"""FLOPs and memory of a run, against PyTorch's count and published sizes (tests/launch compares measured peaks)."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config import DeepSpeedConfig
from distilspeed.trainer.families.bert import BertFamily
from distilspeed.trainer.models.flops import flops_per_token, model_shape
from distilspeed.trainer.training.memory import estimate_memory

BERT_BASE = BertConfig()
DISTILBERT = BertFamily().student_config(BERT_BASE, range(6))


def test_parameter_counts_match_bert_base_and_distilbert() -> None:
    # 109.5 M and 67.0 M with the MLM head (Sanh et al. 2019 give 110 M and 66 M).
    assert model_shape(BERT_BASE).parameters == pytest.approx(109.5e6, rel=0.01)
    assert model_shape(DISTILBERT).parameters == pytest.approx(67.0e6, rel=0.01)


def test_forward_flops_equal_pytorchs_count() -> None:
    config = BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).eval()
    model.config._attn_implementation = "eager"  # the counter sees each product of eager attention
    length = 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long))
    assert model_shape(config).forward_flops_per_token(length) * length == counter.get_total_flops()


def test_a_step_costs_the_students_training_and_the_teachers_forward_pass() -> None:
    student, teacher = model_shape(DISTILBERT), model_shape(BERT_BASE)
    expected = 3 * student.forward_flops_per_token(512) + teacher.forward_flops_per_token(512)
    assert flops_per_token(student, teacher, 512) == expected
    assert flops_per_token(teacher, None, 512) == 3 * teacher.forward_flops_per_token(512)
    restricted = 3 * student.forward_flops_per_token(512, 0.15) + teacher.forward_flops_per_token(512, 0.15)
    assert flops_per_token(student, teacher, 512, head_share=0.15) == restricted


def fp16(zero: dict[str, Any]) -> DeepSpeedConfig:
    return DeepSpeedConfig({"fp16": {"enabled": True}, "zero_optimization": zero})


def test_each_zero_stage_shards_its_part_of_the_memory() -> None:
    student, teacher = model_shape(DISTILBERT), model_shape(BERT_BASE)
    batch = BatchEquation(4096, 8, 64, 8)
    plans = [estimate_memory(student, teacher, batch, 512, fp16({"stage": stage})) for stage in range(4)]
    assert plans[0].optimizer_states == 12 * student.parameters
    assert plans[1].optimizer_states == plans[0].optimizer_states // 8
    assert plans[1].gradients == plans[0].gradients
    assert plans[2].gradients == plans[0].gradients // 8
    assert plans[2].weights == plans[0].weights
    assert plans[3].weights == plans[0].weights // 8
    offload = fp16({"stage": 2, "offload_optimizer": {"device": "cpu"}})
    assert estimate_memory(student, teacher, batch, 512, offload).optimizer_states == 0


def test_a_reduction_bucket_counts_in_full_and_has_deepspeeds_default_size() -> None:
    student = model_shape(DISTILBERT)
    batch = BatchEquation(64, 8, 1, 8)

    def buckets(**zero: object) -> int:
        return estimate_memory(student, None, batch, 128, fp16(zero)).buckets

    assert buckets(stage=0) == 0
    assert buckets(stage=1) == 1_000_000_000
    assert buckets(stage=1, reduce_bucket_size=1000) == 2000
    assert buckets(stage=1, reduce_bucket_size=1000, overlap_comm=True) == 4000
