"""A training that tests interrupt, and its processes."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from jobs import Job, cpu_environment, start, wait_until
from launcher import DEEPSPEED, ROOT, free_port, ranks_alone, training_flags, write_config

from distilspeed.trainer.engine.checkpoint import Checkpoint

STEPS, SAVE_STEPS, BATCH, MICRO_BATCH = 24, 2, 64, 16
SECONDS_TO_END = 300  # until no process of a job may be left; a busy machine is ten times slower
TRAIN = ROOT / "launch" / "train.py"
FAULTY = Path(__file__).with_name("fault_job.py")
FORKSERVER = Path(__file__).with_name("forkserver_job.py")
CPU_HAS_FP16 = CPU_Accelerator().is_fp16_supported()
needs_fp16 = pytest.mark.skipif(not CPU_HAS_FP16, reason="this CPU has no fp16")


class Training:
    """One training that can be started repeatedly."""

    def __init__(self, teacher: Path, corpus: Path, run: Path, ranks: int = 2) -> None:
        self.run = run
        self.ranks = ranks
        self.teacher = teacher
        self.corpus = corpus
        self.config = write_config(run.parent / "config.json", {})

    def start(
        self, *more: object, script: Path = TRAIN, prefix: Sequence[object] = (), **environment: object
    ) -> Job:
        """Start or resume the training.

        Args:
            more: further arguments.
            prefix: a command that starts another command, for example nohup.
            environment: further variables.
        """
        launcher = [DEEPSPEED, "--num_gpus", self.ranks, "--master_port", free_port()]
        return start(
            [*prefix, *launcher, script, *self._flags(), *more],
            cpu_environment(**environment),
            self.run.parent,
        )

    def run_alone(
        self, *more: object, script: Path = TRAIN, **environment: object
    ) -> subprocess.CompletedProcess[str]:
        """Start or resume the training without a launcher, and wait for its end."""
        arguments = [script, *self._flags(), *more]
        return ranks_alone(*arguments, ranks=self.ranks, folder=self.run.parent, **environment)

    def _flags(self) -> list[object]:
        flags = training_flags(
            self.teacher,
            self.corpus,
            self.run,
            deepspeed_config=self.config,
            max_steps=STEPS,
            train_batch_size=BATCH,
            per_device_train_batch_size=MICRO_BATCH,
            save_steps=SAVE_STEPS,
            logging_steps=4,
        )
        return [*flags, "--resume"]

    def finish(self) -> None:
        result = self.run_alone()
        assert result.returncode == 0, result.stderr[-3000:]

    def newest(self) -> Checkpoint:
        """Return the newest checkpoint; check that it is undamaged."""
        checkpoint = Checkpoint.read(max((self.run / "checkpoints").glob("step_*[0-9]")))
        assert checkpoint.damage() is None
        return checkpoint

    def assert_nothing_is_left(self) -> None:
        wait_until(lambda: not processes_of(self.run), seconds=SECONDS_TO_END)


def processes_of(run: Path) -> dict[str, psutil.Process]:
    """Return the processes of a job by role: "deepspeed", "launcher", "rank 0", "rank 1"."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(run) not in command:
            continue
        if "deepspeed.launcher.launch" in command:
            name = "launcher"
        elif any(Path(part).name == "deepspeed" for part in command[:2]):
            name = "deepspeed"
        else:
            ranks = [part.partition("=")[2] for part in command if part.startswith("--local_rank=")]
            name = f"rank {ranks[0]}" if ranks else f"process {process.pid}"
        found.setdefault(name, process)  # a rank's forked data workers come after it
    return found
