"""A job that prints the largest size in bytes of all tensors in a training step; its flags are those of train.py."""

import sys
from pathlib import Path

from distilspeed.trainer.job.parser import CommandParser
from distilspeed.trainer.job.ranks import joined_job
from distilspeed.trainer.throughput.contestants import Ours, peak_bytes, resident_bytes
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.run import prepare_run

if __name__ == "__main__":
    run = prepare_run(CommandParser(TrainArguments, prog=Path(__file__).name, description=__doc__).parse()[0])
    device = run.process.device
    with joined_job(run.process):
        trainer = Ours(run)
        trainer.steps(1)  # the first step makes the optimiser states
        peak = peak_bytes(lambda: trainer.steps(1), device, resident_bytes(device))
    sys.stdout.write(f"\npeak {peak}\n")
