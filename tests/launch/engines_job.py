"""A job for the launcher: observe the engines of student and teacher; each rank writes its observations.

deepspeed engines_job.py CORPUS FOLDER      writes FOLDER/seen0.json, FOLDER/seen1.json, …
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

from distilspeed.trainer.corpus.format import Corpus, open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.engine.config_auto import resolve_deepspeed_config
from distilspeed.trainer.engine.config_file import read_deepspeed_config
from distilspeed.trainer.engine.optimizers import settle_optimizer
from distilspeed.trainer.engine.student import DTYPES, optimizer_step, student_engine
from distilspeed.trainer.engine.teacher import ReplicatedTeacher, ShardedTeacher
from distilspeed.trainer.job.ranks import joined_job, this_process

CONFIG = Path(__file__).parents[2] / "ds_configs" / "cpu.json"
ACCUMULATION, STEPS, WIDTH = 3, 2, 64
HIDDEN_SIZE = 512


@dataclass(frozen=True)
class SeenTeacher:
    """A sharded teacher compared with a replicated one, on one rank."""

    same_outputs: bool
    replicated_elements: int
    sharded_elements: int


class Collectives(TorchDispatchMode):
    """Counts the operations of process groups inside the context, at PyTorch's dispatcher."""

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


def config_for(stage: int, precision: str, optimizer: dict[str, Any] | None = None) -> ResolvedConfig:
    config = read_deepspeed_config(CONFIG)
    # With a threshold above 0, ZeRO-3 keeps parameters as small as these whole on every rank.
    config = config.with_sections(
        zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0},
        bf16={"enabled": precision == "bf16"},
        optimizer=optimizer or config.section("optimizer"),
    )
    process = this_process()
    batch = BatchEquation(ACCUMULATION * process.world_size, 1, ACCUMULATION, process.world_size)
    return settle_optimizer(
        resolve_deepspeed_config(config, batch, 10, None), process.device, process.local_rank
    )


def collectives_of_micro_steps(stage: int, precision: str) -> list[int]:
    """Count the collectives of each micro-step in ``STEPS`` optimiser steps of ``ACCUMULATION`` micro-steps."""
    engine = student_engine(Loss(), config_for(stage, precision))
    counts = []
    for _ in range(STEPS * ACCUMULATION):
        with Collectives() as collectives:
            engine.backward(engine(torch.ones(1, WIDTH, dtype=DTYPES[precision])))
            optimizer_step(engine)
        counts.append(collectives.count)
    return counts


def starts_untouched(optimizer: str) -> bool:
    """Return whether an optimiser in bf16 without ZeRO starts with the student's weights and without states."""
    params = {"lr": 0.1, "weight_decay": 0.5} | ({"torch_adam": True} if optimizer == "AdamW" else {})
    torch.manual_seed(0)
    module = Loss()
    weights = [parameter.detach().bfloat16().float() for parameter in module.parameters()]
    engine = student_engine(module, config_for(0, "bf16", {"type": optimizer, "params": params}))
    (group,) = engine.basic_optimizer.param_groups
    same = all(torch.equal(copy, weight) for copy, weight in zip(group["params"], weights, strict=True))
    return same and not engine.basic_optimizer.state and "step" not in group


def see_teacher(precision: str, corpus: Corpus) -> SeenTeacher:
    process = this_process()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=corpus.manifest.vocab_size,
        hidden_size=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN_SIZE,
        max_position_embeddings=corpus.manifest.seq_length,
    )
    models = [BertForMaskedLM._from_config(config, attn_implementation="sdpa").eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    dtype = DTYPES[precision]
    replicated = ReplicatedTeacher(models[0], dtype, process.device)
    sharded = ShardedTeacher(models[1], dtype, config_for(1, precision))
    same = True
    equation = BatchEquation(process.world_size, 1, 1, process.world_size)
    batches = MicroBatches(corpus, equation, process.rank, seed=0)
    # ZeRO-3 records the order of the layers in the first batch, and prefetches in the others.
    for batch in batches.loader(0, 3, num_workers=0):
        ours, theirs = replicated(batch), sharded(batch)
        same &= torch.equal(ours.logits, theirs.logits)
        same &= torch.equal(ours.hidden_states, theirs.hidden_states)
    return SeenTeacher(same, resident_elements(models[0]), resident_elements(models[1]))


def resident_elements(model: nn.Module) -> int:
    """Return the weight elements that this rank holds now: whole weights, and its shards of the others."""
    whole = sum(parameter.data.numel() for parameter in model.parameters())
    return whole + sum(
        parameter.ds_tensor.numel() for parameter in model.parameters() if hasattr(parameter, "ds_tensor")
    )


def look(corpus: Corpus) -> dict[str, Any]:
    return {
        "collectives": {
            f"zero{stage}_{precision}": collectives_of_micro_steps(stage, precision)
            for precision in ("fp32", "bf16")
            for stage in (0, 1, 2, 3)
        },
        "starts_untouched": {optimizer: starts_untouched(optimizer) for optimizer in ("AdamW", "Lamb")},
        "teacher": {precision: asdict(see_teacher(precision, corpus)) for precision in ("fp32", "bf16")},
    }


if __name__ == "__main__":
    corpus_dir, folder = map(Path, sys.argv[-2:])
    with joined_job(this_process()):
        seen = look(open_corpus(corpus_dir))
    (folder / f"seen{this_process().rank}.json").write_text(json.dumps(seen))
