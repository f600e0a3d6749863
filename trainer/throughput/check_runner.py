"""Running the parts of a check, each within its time, and reporting on all of them whatever becomes of one."""

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

    seconds       they may take together
    result        JSON file that they write; what they print goes into the report then
    environment   variables besides those of this process
    """

    name: str
    seconds: float
    commands: Sequence[Sequence[object]]
    result: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a part: PASSED, FAILED, TIMED_OUT or NOT_INSTALLED, and what it said last."""

    name: str
    status: str
    seconds: float
    commands: list[str]
    said: str
    result: Any = None


class Runner:
    """Runs parts until the time is over; report.json and report.md tell of those that have ended.

    Args:
        folder: exists; gets the report, and in logs/ what every part prints.
        seconds: for all parts.
        pace: the time that each part may take over its ``seconds``.
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
        """Whether no part failed or ran out of time; one whose program is not installed does not count."""
        return all(outcome.status in (PASSED, NOT_INSTALLED) for outcome in self.outcomes)

    def run(self, *parts: Part) -> None:
        """Run parts one after the other, whatever becomes of each.

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
            except (OSError, ValueError) as error:  # no program, or not the result that it should write
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
                self._end = 0.0  # for those that still run
                raise

    def report(self) -> str:
        """What became of the parts, and what the measurements printed, in Markdown."""
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
        """Status, and what was said last."""
        for command in part.commands:
            if shutil.which(str(command[0])) is None:
                return NOT_INSTALLED, f"there is no {command[0]}"
            if time.monotonic() >= end:
                return TIMED_OUT, "no time was left"
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
                    # Looked at again and again, because Ctrl-C makes the end earlier.
                    while process.poll() is None and time.monotonic() < min(end, self._end):
                        time.sleep(0.1)
                    if process.returncode is None:
                        return TIMED_OUT, "ended for want of time"
                finally:
                    end_tree(process)
            if process.returncode:
                return FAILED, self._reason(part.name, process.returncode)
        return PASSED, next(iter(self._printed(part.name, "out")[-1:]), "")

    def _reason(self, name: str, status: int) -> str:
        """An error in one line, or the last line that says anything: pytest's, or a traceback's."""
        errors = self._printed(name, "err")
        said = [line for line in errors if line.startswith("error: ")] or errors or self._printed(name, "out")
        return said[-1] if said else f"status {status}"

    def _printed(self, name: str, kind: str) -> list[str]:
        text = self._log(name, kind).read_text(encoding="utf-8", errors="replace")
        return text.rstrip().splitlines()

    def _log(self, name: str, kind: str) -> Path:
        return self.logs / f"{file_name(name)}.{kind}"


def file_name(part: str) -> str:
    return part.replace(", ", "_").replace(" ", "_")


def end_tree(process: subprocess.Popen[Any]) -> None:
    """End a command, if it still runs, and all that it started: as Ctrl-C does, and after a while with SIGKILL."""
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
