"""A job for the launcher: train once for each set of arguments in a JSON file, one after the other.

Starting Python and joining the ranks takes longer than two steps of a small model. The training itself is unchanged.
"""

import json
import sys
from pathlib import Path
from typing import Any

from distilspeed.trainer.job.command import show_log
from distilspeed.trainer.job.ranks import joined_job, this_process
from distilspeed.trainer.training.arguments import TrainArguments
from distilspeed.trainer.training.loop import train
from distilspeed.trainer.training.run import prepare_run

PATHS = ("deepspeed_config", "data_dir", "output_dir")


def arguments_of(run: dict[str, Any]) -> TrainArguments:
    return TrainArguments(**{name: Path(value) if name in PATHS else value for name, value in run.items()})


if __name__ == "__main__":
    show_log()
    with joined_job(this_process()):
        for run in json.loads(Path(sys.argv[-1]).read_text()):
            train(prepare_run(arguments_of(run)))
