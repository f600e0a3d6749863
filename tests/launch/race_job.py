"""Two jobs at once in one new folder: both pass their first checks, and the second locks the folder after the first.

python race_job.py RUNS.json      the arguments of both (many_runs_job.py)
"""

import json
import sys
from pathlib import Path

from many_runs_job import arguments_of

from distilspeed.trainer.job.command import run_command
from distilspeed.trainer.training.loop import train
from distilspeed.trainer.training.run import prepare_run


def main() -> None:
    first, second = (prepare_run(arguments_of(run)) for run in json.loads(Path(sys.argv[-1]).read_text()))
    train(first)
    print("the first is done", flush=True)
    train(second)
    print("the second is done")


run_command(main)
