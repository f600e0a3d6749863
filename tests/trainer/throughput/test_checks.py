"""Parts of a check: if one fails, the others still run, the report is complete, and no process is left running."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from distilspeed.kernels.profiling.machine import Machine
from distilspeed.trainer.throughput import check_runner
from distilspeed.trainer.throughput.check_runner import (
    FAILED,
    NOT_INSTALLED,
    PASSED,
    TIMED_OUT,
    Outcome,
    Part,
    Runner,
)

# Ignores SIGINT and starts a child in its own session, so that both end only by SIGKILL.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(1000)
"""
LEAVES_A_CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]).pid)
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(check_runner, "SECONDS_TO_END", 0.5)
    return Runner(tmp_path, Machine.here(torch.device("cpu")), seconds=60)


def python(code: str, name: str = "part", seconds: float = 30, result: Path | None = None) -> Part:
    return Part(name, seconds, [[sys.executable, "-c", code]], result)


def outcome_of(runner: Runner, part: Part) -> Outcome:
    runner.run(part)
    return runner.outcomes[-1]


def wait_for_end(pid: int) -> None:
    """Wait for a process that was killed: on a busy machine that takes a moment."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.time() < process.create_time() + 600
            time.sleep(0.01)


def reports(folder: Path) -> tuple[list[dict[str, object]], str]:
    return json.loads((folder / "report.json").read_text())["parts"], (folder / "report.md").read_text()


def test_the_result_and_output_of_a_part_are_in_the_report(runner: Runner, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    code = f"print('a table'); open({str(result)!r}, 'w').write('{{\"speed\": 2}}')"
    assert outcome_of(runner, python(code, result=result)).status == PASSED
    (part,), text = reports(tmp_path)
    assert part["result"] == {"speed": 2}
    assert part["commands"][0].startswith("python -c")
    assert "```\na table\n```" in text
    assert runner.all_passed


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; print('error: no such card; buy one', file=sys.stderr); print('more'); sys.exit(2)",
            "error: no",
        ),
        ("raise ValueError('wrong')", "ValueError: wrong"),
        ("print('1 failed'); raise SystemExit(1)", "1 failed"),
        ("raise SystemExit(3)", "status 3"),
        ("import sys; sys.stdout.buffer.write(b'caf\\xe9'); sys.exit(1)", "caf"),
    ],
)
def test_the_message_of_a_failing_part_is_in_the_report(
    runner: Runner, tmp_path: Path, code: str, message: str
) -> None:
    runner.run(python(code, "one"), python("", "other"))
    assert [each.status for each in runner.outcomes] == [FAILED, PASSED]
    assert message in runner.outcomes[0].said
    assert message in reports(tmp_path)[1]
    assert not runner.all_passed


@pytest.mark.parametrize("result", ["missing.json", "broken.json"])
def test_a_part_without_a_valid_result_fails(runner: Runner, tmp_path: Path, result: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    assert outcome_of(runner, python("", result=tmp_path / result)).status == FAILED
    assert len(reports(tmp_path)[0]) == 1


def test_a_missing_or_broken_program_does_not_stop_the_other_parts(runner: Runner, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("not a program")
    broken.chmod(0o755)
    runner.run(Part("none", 9, [["no-such-program"]]), Part("broken", 9, [[broken]]), python(""))
    assert [each.status for each in runner.outcomes] == [NOT_INSTALLED, FAILED, PASSED]
    assert "no-such-program" in runner.outcomes[0].said


def test_no_command_runs_after_one_that_fails(runner: Runner, tmp_path: Path) -> None:
    commands = [
        [sys.executable, "-c", code]
        for code in ("print('a')", "1 / 0", f"open({str(tmp_path / 'c')!r}, 'w')")
    ]
    assert outcome_of(runner, Part("three", 9, commands)).status == FAILED
    assert not (tmp_path / "c").exists()


def test_a_part_that_times_out_is_ended_with_its_children(runner: Runner, tmp_path: Path) -> None:
    assert outcome_of(runner, python(STUBBORN, seconds=5)).status == TIMED_OUT
    wait_for_end(int((tmp_path / "logs" / "part.out").read_text()))
    assert outcome_of(runner, python("")).status == PASSED


def test_a_child_that_a_part_leaves_running_is_ended(runner: Runner, tmp_path: Path) -> None:
    assert outcome_of(runner, python(LEAVES_A_CHILD)).status == PASSED
    wait_for_end(int((tmp_path / "logs" / "part.out").read_text()))


def test_no_part_starts_after_the_time_limit(tmp_path: Path) -> None:
    runner = Runner(tmp_path, Machine.here(torch.device("cpu")), seconds=0)
    runner.run(python("print('started')"))
    assert runner.outcomes[0].status == TIMED_OUT
    assert not list((tmp_path / "logs").iterdir())


def test_sequences_run_at_the_same_time(runner: Runner, tmp_path: Path) -> None:
    meet = """
import sys, time
from pathlib import Path
mine, other = map(Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.05)
"""
    a, d = (
        Part(name, 50, [[sys.executable, "-c", meet, tmp_path / name, tmp_path / other]])
        for name, other in ("ad", "da")
    )
    runner.run_together([a, python("1 / 0", "b"), python("", "c")], [d])
    statuses = {each.name: each.status for each in runner.outcomes}
    assert statuses == {"a": PASSED, "b": FAILED, "c": PASSED, "d": PASSED}


def test_an_unwritable_report_ends_all_parts(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match="report"):
        runner.run_together(
            [python("", "quick")], [python("import time; time.sleep(50); print('slept')", "slow")]
        )
    # The slow part may not even have started.
    assert not any("slept" in log.read_text() for log in (tmp_path / "logs").glob("slow.out"))


def test_ctrl_c_ends_the_running_parts(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import torch
from distilspeed.kernels.profiling.machine import Machine
from distilspeed.trainer.throughput.check_runner import Part, Runner
runner = Runner(Path({str(tmp_path)!r}), Machine.here(torch.device("cpu")), seconds=60)
part = Part("sleep", 50, [[sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"]])
runner.run_together([part])
"""
    job = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    log = tmp_path / "logs" / "sleep.out"
    while not (log.exists() and log.read_text().strip()):
        assert job.poll() is None
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(300) != 0
    wait_for_end(int(log.read_text()))
