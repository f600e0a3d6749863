"""Run the parts of a check, each with a time limit, and report on all parts, even if one fails."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import psutil

from distilspeed.trainer.errors import first_line
from distilspeed.trainer.files import write_text

if TYPE_CHECKING:
    from distilspeed.kernels.profiling.machine import Machine

PASSED, FAILED, TIMED_OUT, NOT_INSTALLED = "passed", "failed", "timed out", "not installed"
SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other until one fails.

    seconds       time limit of all commands together
    result        JSON file that the commands write; if set, their output goes into the report
    environment   variables added to those of this process
    """

    name: str
    seconds: float
    commands: Sequence[Sequence[object]]
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part; ``status`` is PASSED, FAILED, TIMED_OUT or NOT_INSTALLED, ``said`` its last message."""

    name: str
    status: str
    seconds: float
    commands: list[str]
    said: str
    result: Any = None


class Runner:
    """Runs parts within a time limit; report.json and report.md describe the parts that have ended.

    Args:
        folder: an existing folder for the report, and for the output of every part in logs/.
        seconds: time limit of all parts together.
        pace: factor by which the time limit of each part is multiplied.
    """

    def __init__(self, folder: Path, machine: "Machine", seconds: float, pace: float = 1.0) -> None:
        self.folder, self.logs = folder, folder / "logs"
        self.logs.mkdir()
        self.machine, self.pace = machine, pace
        self.outcomes: list[Outcome] = []
        self._end = time.monotonic() + seconds
        self._reporting = Lock()

    @property
    def all_passed(self) -> bool:
        """Whether no part failed or timed out; parts whose program is not installed do not count."""
        return all(outcome.status in (PASSED, NOT_INSTALLED) for outcome in self.outcomes)

    def run(self, *parts: Part) -> None:
        """Run parts one after the other, even if some fail.

        Raises:
            OSError: the report cannot be written.
        """
        for part in parts:
            start = time.monotonic()
            result = None
            try:
                status, said = self._run_commands(part, min(self._end, start + self.pace * part.seconds))
                if status == PASSED and part.result:
                    result, said = json.loads(part.result.read_text(encoding="utf-8")), ""
            except (
                OSError,
                ValueError,
            ) as error:  # the program cannot start, or its result is missing or invalid
                status, said = FAILED, first_line(error)
            programs = f"{Path(sys.executable).parent}/"
            commands = [shlex.join(map(str, command)).replace(programs, "") for command in part.commands]
            seconds = round(time.monotonic() - start, 1)
            with self._reporting:
                self.outcomes.append(Outcome(part.name, status, seconds, commands, said, result))
                print(f"{part.name}: {status}, {seconds:.0f} s", file=sys.stderr, flush=True)
                self._write_report()

    def run_together(self, *sequences: Sequence[Part]) -> None:
        """Run sequences of parts at the same time."""
        with ThreadPoolExecutor(len(sequences) or 1) as threads:
            try:
                list(threads.map(lambda parts: self.run(*parts), sequences))
            except BaseException:
                self._end = 0.0  # ends the parts that still run
                raise

    def report(self) -> str:
        """Return the outcome of the parts and the output of the measurements, in Markdown."""
        rows = [("part", "", "seconds", ""), ("---", "---", "---:", "---")]
        rows += [(each.name, each.status, f"{each.seconds:.0f}", each.said) for each in self.outcomes]
        lines = [f"{self.machine}", ""]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        for outcome in self.outcomes:
            if outcome.result is not None:
                lines += ["", f"## {outcome.name}", "", "```", *self._printed(outcome.name, "out"), "```"]
        return "\n".join(lines) + "\n"

    def _write_report(self) -> None:
        report = {"machine": asdict(self.machine), "parts": [asdict(outcome) for outcome in self.outcomes]}
        write_text(self.folder / "report.json", json.dumps(report, indent=2) + "\n")
        write_text(self.folder / "report.md", self.report())

    def _run_commands(self, part: Part, end: float) -> tuple[str, str]:
        """Return the status and the last message of a part."""
        for command in part.commands:
            if shutil.which(str(command[0])) is None:
                return NOT_INSTALLED, f"{command[0]} is not installed"
            if time.monotonic() >= end:
                return TIMED_OUT, "not started: no time was left"
            with (
                self._log(part.name, "out").open("a") as output,
                self._log(part.name, "err").open("a") as errors,
            ):
                process = subprocess.Popen(
                    [str(word) for word in command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env={**os.environ, **part.environment},
                    start_new_session=True,
                )
                try:
                    # Poll, because run_together moves self._end to the past on Ctrl-C or an error.
                    while process.poll() is None and time.monotonic() < min(end, self._end):
                        time.sleep(0.1)
                    if process.returncode is None:
                        return TIMED_OUT, "stopped at its time limit"
                finally:
                    end_tree(process)
            if process.returncode:
                return FAILED, self._reason(part.name, process.returncode)
        return PASSED, next(iter(self._printed(part.name, "out")[-1:]), "")

    def _reason(self, name: str, status: int) -> str:
        """Return the last "error: " line, else the last line of stderr, else of stdout, else the status."""
        errors = self._printed(name, "err")
        lines = (
            [line for line in errors if line.startswith("error: ")] or errors or self._printed(name, "out")
        )
        return lines[-1] if lines else f"status {status}"

    def _printed(self, name: str, kind: str) -> list[str]:
        text = self._log(name, kind).read_text(encoding="utf-8", errors="replace")
        return text.rstrip().splitlines()

    def _log(self, name: str, kind: str) -> Path:
        return self.logs / f"{file_name(name)}.{kind}"


def file_name(part: str) -> str:
    return part.replace(", ", "_").replace(" ", "_")


def end_tree(process: subprocess.Popen[Any]) -> None:
    """End a command and all processes that it started, with SIGINT if it still runs, then with SIGKILL."""
    tree = []
    if process.poll() is None:
        with contextlib.suppress(psutil.Error):
            tree = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    _, alive = psutil.wait_procs(tree, SECONDS_TO_END)
    for left in alive:
        with contextlib.suppress(psutil.Error):
            left.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(alive, SECONDS_TO_END)
