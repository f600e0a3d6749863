"""Run both contestants in turns on one machine, and the trainer on several ranks."""

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.environment import unprepared_environment
from distilspeed.trainer.job.ranks import free_port
from distilspeed.trainer.throughput.contestants import ANSWER, EAGER, OURS, Footprint, Lap

# Target length of a turn, which has at least one step. A GPU needs less time: its steps are short, and no other job
# shares it.
SECONDS_PER_TURN = {"cpu": 6.0, "cuda": 2.0}
LAPS_ON_RANKS = 5


@dataclass(frozen=True)
class Comparison:
    """The measurements of the contestants; laps with the same index ran directly after each other."""

    laps: dict[str, list[Lap]]
    footprints: dict[str, Footprint]


class ContestantProcess:
    """A contestant in its own process; it works only between a request and its answer."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [*command, "--contestant", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=unprepared_environment() if name == EAGER else None,
            # Ctrl-C in a terminal must reach only the parent, which ends this process.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def first_lap(self) -> Lap:
        """Wait for the lap of one step that the process takes after its warm-up."""
        return Lap(**self._answer())

    def lap(self, steps: int) -> Lap:
        return Lap(**self._ask(str(steps)))

    def footprint(self) -> Footprint:
        return Footprint(**self._ask(""))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; reading its answer reports how
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        status = self._process.wait()
        if status == UserError.status:  # the process has reported the reason
            raise UserError("failed-step", f"the process that runs {self.name!r} could not start; see above")
        raise UserError(
            "failed-step", f"the process that runs {self.name!r} ended with status {status}; see above"
        )


def compare(
    command: Sequence[str], rounds: int, seconds_per_turn: float, names: Sequence[str] = (OURS, EAGER)
) -> Comparison:
    """Run the contestants in turns, in alternating order.

    Args:
        command: the command that starts a contestant, without ``--contestant NAME``.
    """
    with ExitStack() as stack:
        processes: list[ContestantProcess] = []
        steps: dict[str, int] = {}
        for name in names:  # one at a time, because one's warm-up would disturb the other's first lap
            processes.append(stack.enter_context(ContestantProcess(name, command)))
            steps[name] = max(1, round(seconds_per_turn / processes[-1].first_lap().seconds))
        laps: dict[str, list[Lap]] = {name: [] for name in names}
        for number in range(rounds):
            for process in processes if number % 2 else reversed(processes):
                laps[process.name].append(process.lap(steps[process.name]))
        footprints = {process.name: process.footprint() for process in processes}
    return Comparison(laps, footprints)


def measure_scaling(arguments: Sequence[str], ranks: Sequence[int]) -> dict[str, float]:
    """Return the trainer's tokens per second on several ranks of this host, relative to one rank.

    All runs use DeepSpeed's launcher, and the ranks share the cores. Each run counts with its fastest lap.

    Args:
        arguments: script and arguments that start a contestant, without ``--contestant`` and ``--laps``.
    """
    if not ranks:
        return {}
    alone = _fastest(arguments, 1).tokens_per_s
    return {str(count): _fastest(arguments, count).tokens_per_s / alone for count in ranks}


def _fastest(arguments: Sequence[str], ranks: int) -> Lap:
    launcher = Path(sys.executable).with_name("deepspeed")
    what = ["--contestant", OURS, "--laps", ",".join(["1"] * LAPS_ON_RANKS)]
    command = [launcher, "--num_gpus", ranks, "--master_port", free_port(), *arguments, *what]
    result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith(ANSWER)]
    if result.returncode or not lines:
        raise UserError(
            "failed-step", f"the trainer on {ranks} ranks ended with status {result.returncode}; see above"
        )
    laps = [Lap(**json.loads(line.removeprefix(ANSWER))) for line in lines]
    return max(laps, key=lambda lap: lap.tokens_per_s)
