"""A job whose ranks end in a given way, started without a launcher.

python ending_job.py success    the ranks agree on an optimiser (rank 1 cannot build DeepSpeed's), and end
python ending_job.py error      rank 1 raises an error of ours while rank 0 waits for it
python ending_job.py fault      rank 1 raises another error, with a pending collective that rank 0 never joins
"""

import atexit
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed

from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.engine import optimizers
from distilspeed.trainer.engine.config import ResolvedConfig
from distilspeed.trainer.errors import NumericalError
from distilspeed.trainer.job.command import run_command
from distilspeed.trainer.job.ranks import Process, joined_job, this_process
from distilspeed.trainer.job.watch import JobWatch

INTERPRETERS_END = "the interpreter's end"


def settled_adam(process: Process) -> dict[str, object]:
    """Settle the optimiser as on two hosts with GPUs; the operator is built before another rank of a host loads it."""
    built = Path("built")

    def load(builder: optimizers.OpBuilder) -> None:
        if process.rank == 1:
            assert built.exists()
            raise RuntimeError("no such compiler")
        time.sleep(1)
        built.touch()

    optimizers.installed_ops["fused_adam"] = True
    optimizers.FusedAdamBuilder.load = load
    adam = {"type": "AdamW", "params": {"torch_adam": "auto", "fused": "auto"}}
    config = ResolvedConfig({"optimizer": adam}, BatchEquation(2, 1, 1, 2))
    settled = optimizers.settle_optimizer(config, torch.device("cuda", 0), process.local_rank)
    return settled.section("optimizer")["params"]


def show_the_end() -> None:
    print(f"{INTERPRETERS_END}, in a job: {torch.distributed.is_initialized()}", file=sys.stderr)


def main() -> None:
    (way,) = sys.argv[1:]
    # Exit handlers run in reverse order: this one, registered before the ranks join, runs after the job's own.
    atexit.register(
        lambda: print(f"{INTERPRETERS_END}, in a job: {torch.distributed.is_initialized()}", file=sys.stderr)
    )
    process = this_process()
    with joined_job(process):
        if way == "fault":
            if process.rank == 0:
                time.sleep(3600)
            torch.distributed.all_reduce(torch.ones(1), async_op=True)
            raise ValueError("a fault")
        with JobWatch(process, timeout=600):
            if way == "success":
                print(json.dumps(settled_adam(process)))
            elif process.rank == 1:
                raise NumericalError("no number")
            torch.distributed.barrier()


if __name__ == "__main__":
    run_command(main)
