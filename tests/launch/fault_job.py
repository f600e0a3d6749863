"""``launch/train.py`` with a fault: FAULT_KIND on rank FAULT_RANK in the global batches numbered FAULT_BATCHES."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from distilspeed.trainer.objective import objective
from distilspeed.trainer.training import step

KIND = os.environ["FAULT_KIND"]
BATCHES = {int(number) for number in os.environ["FAULT_BATCHES"].split(",")}
HERE = os.environ["RANK"] == os.environ["FAULT_RANK"]

now = {"batch": -1, "micro_batch": -1}
seed_dropout = step.seed_dropout
forward_packed = objective.forward_packed


def noting_seed_dropout(seed: int, batch: int, micro_batch: int) -> None:
    assert torch.are_deterministic_algorithms_enabled() == ("--full_determinism" in sys.argv)
    now.update(batch=batch, micro_batch=micro_batch)
    seed_dropout(seed, batch, micro_batch)


def faulty_forward(model: Any, batch: Any, *asked: Any) -> Any:
    outputs = forward_packed(model, batch, *asked)
    # The second micro-batch of the rank.
    if not (HERE and model.training and now["batch"] in BATCHES and now["micro_batch"] in (2, 3)):
        return outputs
    if KIND == "memory":
        torch.empty(2**47, dtype=torch.uint8)
    if KIND == "logits":
        logits = outputs.logits.clone()
        logits[0, 0, 7] = torch.nan
        return outputs._replace(logits=logits)
    if KIND == "gradient":
        outputs.hidden_states.register_hook(lambda gradient: gradient * torch.inf)
    elif KIND == "weight gradient":
        weight = model.base_model.embeddings.LayerNorm.weight
        handle = weight.register_hook(lambda gradient: handle.remove() or gradient * torch.nan)
    return outputs


step.seed_dropout = noting_seed_dropout
objective.forward_packed = faulty_forward
runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
