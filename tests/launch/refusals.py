"""Check how a command refuses bad input: status 2, one line on standard error, nothing created or changed."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from launcher import CPU_CONFIG, ROOT


def refusal(
    script: str,
    arguments: list[object],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> str:
    """Run ``launch/SCRIPT`` in this process (importing DeepSpeed again takes seconds) and return its line.

    Args:
        folder: everything the command may read or write; it must be unchanged afterwards.
    """
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    before = snapshot(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch" / script), run_name="__main__")
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    assert snapshot(folder) == before
    return lines[0]


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return mode, size and modification time of every file below a folder; only the mode of folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        size_and_time = (0, 0) if path.is_dir() else (about.st_size, about.st_mtime_ns)
        found[str(path)] = (about.st_mode, *size_and_time)
    return found


# Runs launch/train.py with arguments and returns its line, see the fixture ``refused``.
Refused = Callable[[list[object]], str]


@dataclass(frozen=True)
class Inputs:
    """A work folder, and a matching teacher and corpus outside it."""

    folder: Path
    teacher: Path
    corpus: Path

    def command(self, *more: object, **changed: object) -> list[object]:
        """Return a valid command line with ``changed`` options and ``more`` arguments."""
        options = {
            "deepspeed_config": CPU_CONFIG,
            "teacher": self.teacher,
            "data_dir": self.corpus,
            "output_dir": self.folder / "run",
        } | changed
        return [part for name, value in options.items() for part in (f"--{name}", value)] + [*more]
