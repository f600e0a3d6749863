"""A job for the launcher: count the collectives of each micro-step under each ZeRO stage, into FOLDER/counts.json.

    deepspeed communication_job.py FOLDER

What is counted is every operation that reaches a process group, seen at PyTorch's dispatcher.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distilspeed.trainer.config import BatchEquation, read_deepspeed_config, resolve_deepspeed_config
from distilspeed.trainer.engines import join_job, optimizer_step, student_engine, this_process
from distilspeed.trainer.optimizers import choose_optimizer

CONFIG = Path(__file__).parents[2] / "ds_configs" / "cpu.json"
ACCUMULATION, STEPS, WIDTH = 3, 2, 64


class Collectives(TorchDispatchMode):
    """Counts the operators of ``c10d`` while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows).square().mean()


def collectives_of_micro_steps(stage: int, precision: str) -> list[int]:
    """Of ``STEPS`` optimiser steps with ``ACCUMULATION`` micro-steps each, in order."""
    process = this_process()
    config = choose_optimizer(read_deepspeed_config(CONFIG), process.device)
    # Without a threshold of 0, ZeRO-3 keeps parameters as small as these whole on every rank.
    config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config["bf16"] = {"enabled": precision == "bf16"}
    batch = BatchEquation(ACCUMULATION * process.world_size, 1, ACCUMULATION, process.world_size)
    engine = student_engine(Loss(), resolve_deepspeed_config(config, batch, 10, None))
    dtype = next(engine.module.parameters()).dtype
    counts = []
    for _ in range(STEPS * ACCUMULATION):
        with Collectives() as collectives:
            engine.backward(engine(torch.ones(1, WIDTH, dtype=dtype)))
            optimizer_step(engine)
        counts.append(collectives.count)
    return counts


if __name__ == "__main__":
    join_job(this_process())
    counted = {
        f"zero{stage}_{precision}": collectives_of_micro_steps(stage, precision)
        for precision in ("fp32", "bf16")
        for stage in (0, 1, 2, 3)
    }
    if this_process().rank == 0:
        (Path(sys.argv[-1]) / "counts.json").write_text(json.dumps(counted))
