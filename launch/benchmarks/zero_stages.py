"""Time micro-steps and optimiser steps under a ZeRO stage, for a student of 66 million parameters.

    deepspeed --num_gpus 2 launch/benchmarks/zero_stages.py STAGE [fp32|bf16]

DistilBERT-base trains on few tokens per step, so that optimiser and communication dominate. Rank 0 prints one JSON
line: the medians, in seconds, of the micro-steps inside an accumulation and of those that end one.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from distilspeed.trainer.job.environment import SETTINGS

os.environ.update(SETTINGS | os.environ)

import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertForMaskedLM

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine.config_auto import resolve_deepspeed_config
from distilspeed.trainer.engine.config_file import read_deepspeed_config
from distilspeed.trainer.engine.optimizers import settle_optimizer
from distilspeed.trainer.engine.student import optimizer_step, student_engine
from distilspeed.trainer.job.ranks import Process, joined_job, this_process

CONFIG = Path(__file__).parents[2] / "ds_configs" / "cpu.json"
ROWS, LENGTH, ACCUMULATION, STEPS = 1, 32, 4, 5


class MaskedLanguageModelling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = DistilBertForMaskedLM(DistilBertConfig())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.student(tokens, labels=tokens).loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("stage", type=int)
    parser.add_argument("precision", nargs="?", default="fp32", choices=("fp32", "bf16"))
    asked = parser.parse_args()
    process = this_process()
    with joined_job(process):
        times = measure(asked, process)
    if process.rank == 0:
        print(json.dumps({**vars(asked), "ranks": process.world_size, **times}), flush=True)


def measure(asked: argparse.Namespace, process: Process) -> dict[str, float]:
    config = read_deepspeed_config(CONFIG).with_sections(
        zero_optimization={"stage": asked.stage}, bf16={"enabled": asked.precision == "bf16"}
    )
    batch = BatchEquation(ROWS * ACCUMULATION * process.world_size, ROWS, ACCUMULATION, process.world_size)
    resolved = resolve_deepspeed_config(config, batch, STEPS, None)
    engine = student_engine(
        MaskedLanguageModelling(), settle_optimizer(resolved, process.device, process.local_rank)
    )
    tokens = torch.randint(1000, (ROWS, LENGTH), device=process.device)
    inside: list[float] = []
    ending: list[float] = []
    for micro_step in range(STEPS * ACCUMULATION):
        start = time.perf_counter()
        engine.backward(engine(tokens))
        optimizer_step(engine)
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if micro_step >= ACCUMULATION:  # the first optimiser step allocates states, buckets and traces
            (ending if (micro_step + 1) % ACCUMULATION == 0 else inside).append(seconds)
    return {"inside": statistics.median(inside), "ending": statistics.median(ending)}


if __name__ == "__main__":
    main()
