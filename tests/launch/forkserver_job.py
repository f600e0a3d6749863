"""``launch/train.py`` with the process start method "forkserver", Python's default from 3.14 on."""

import multiprocessing
import runpy
from pathlib import Path

if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / "train.py"), run_name="__main__")
