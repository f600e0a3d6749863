"""Events that end a run, after which it can be resumed: signals, hanging ranks, NaN losses, full disks."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from jobs import assert_same_end, finish, kill, wait_for_checkpoint, wait_until
from launcher import write_config
from training import BATCH, FAULTY, FORKSERVER, MICRO_BATCH, STEPS, TRAIN, Training, needs_fp16, processes_of
from user_errors import assert_names

from distilspeed.trainer.corpus.format import open_corpus
from distilspeed.trainer.data.batch_equation import BatchEquation
from distilspeed.trainer.data.batches import MicroBatches
from distilspeed.trainer.training.metrics import read_metrics

# Runs a command in its own terminal, which is closed when this program ends.
TERMINAL = """
import os, pty, sys
process, terminal = pty.fork()
if process == 0:
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    os.read(terminal, 4096)
"""


def full(*values: object) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.full)


def chaos(*values: object) -> ParameterSet:
    return pytest.param(*values, marks=pytest.mark.chaos)


def lines_with(errors: str, label: str = "error") -> list[str]:
    return [line for line in errors.splitlines() if line.startswith(f"{label}: ")]


@pytest.mark.parametrize(
    ("victim", "sent", "statuses", "reason"),
    [
        full("rank 1", signal.SIGTERM, {75}, "SIGTERM"),
        chaos("rank 0", signal.SIGINT, {75}, "SIGINT"),
        # These two processes end on the signal (DeepSpeed's launcher with its own status), and the ranks after them.
        chaos("launcher", signal.SIGTERM, {1}, "SIGTERM"),
        ("deepspeed", signal.SIGTERM, {-signal.SIGTERM}, "the end of the deepspeed command"),
    ],
)
def test_a_signal_saves_the_step_and_ends_the_run(
    training: Training,
    uninterrupted: Path,
    victim: str,
    sent: signal.Signals,
    statuses: set[int],
    reason: str,
) -> None:
    job = training.start("--dataloader_num_workers", 1)  # the launcher ends workers, too
    wait_for_checkpoint(training.run, job)
    processes_of(training.run)[victim].send_signal(sent)
    training.assert_nothing_is_left()
    status, _, errors = finish(job)
    assert status in statuses, errors[-3000:]
    assert not lines_with(errors), errors
    (line,) = lines_with(errors, "stopped")
    assert_names(line, "stopped", reason, f"step {training.newest().progress.step}")
    assert not (training.run / "student").exists()
    if victim == "deepspeed":
        training.finish()
        assert_same_end(training.run, uninterrupted)


@pytest.mark.full
def test_closing_the_terminal_saves_the_step_and_ends_the_run(training: Training) -> None:
    """As when an ssh session ends: the job gets SIGHUP and can no longer write to its terminal."""
    endless = ("--max_steps", 100_000, "--save_steps", 100_000, "--dataloader_num_workers", 1)
    terminal = training.start(*endless, prefix=[sys.executable, "-c", TERMINAL])
    wait_until((training.run / "metrics.jsonl").is_file, terminal)
    kill(terminal)
    training.assert_nothing_is_left()
    assert training.newest().progress.step > 0


@pytest.mark.full
def test_under_nohup_a_run_outlives_its_terminal(training: Training, uninterrupted: Path) -> None:
    job = training.start(prefix=["nohup"])
    wait_for_checkpoint(training.run, job)
    os.killpg(job.pid, signal.SIGHUP)
    status, _, errors = finish(job)
    assert status == 0, errors[-3000:]
    assert_same_end(training.run, uninterrupted)


@pytest.mark.parametrize("rank", [chaos(0), full(1)])
def test_a_rank_that_stops_answering_is_named_and_ends_the_job(training: Training, rank: int) -> None:
    timeout = 12
    job = training.start("--ddp_timeout", timeout)
    wait_for_checkpoint(training.run, job)
    stopped = processes_of(training.run)[f"rank {rank}"]
    stopped.send_signal(signal.SIGSTOP)
    status, _, errors = finish(job)
    assert status > 0
    assert len(lines_with(errors)) == 1, errors
    assert_names(lines_with(errors)[0], "lost-rank", f"rank {rank}", str(stopped.pid), f"{timeout} seconds")
    training.assert_nothing_is_left()


@pytest.mark.parametrize("script", [TRAIN, chaos(FORKSERVER)], ids=["fork", "forkserver"])
def test_a_rank_that_dies_is_named_and_ends_the_job(training: Training, script: Path) -> None:
    # Forked workers hold copies of the dead rank's connections.
    job = training.start("--dataloader_num_workers", 1, script=script)
    wait_for_checkpoint(training.run, job)
    killed = processes_of(training.run)["rank 1"]
    killed.kill()
    status, _, errors = finish(job)
    assert status > 0
    assert len(lines_with(errors)) == 1, errors
    assert_names(lines_with(errors)[0], "lost-rank", "rank 1", str(killed.pid))
    assert "Traceback" not in errors
    training.assert_nothing_is_left()


@pytest.mark.full
def test_a_rank_without_memory_reports_it_in_one_line(training: Training) -> None:
    result = training.run_alone(script=FAULTY, FAULT_KIND="memory", FAULT_RANK=1, FAULT_BATCHES="5")
    assert result.returncode == 2, result.stderr[-3000:]
    (line,) = lines_with(result.stderr)
    assert_names(line, "out-of-memory", f"{2**47} bytes", "smaller batch")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("kind", "what"),
    [("logits", "loss"), full("gradient", "gradient"), chaos("weight gradient", "gradient")],
)
def test_a_nan_ends_the_run_and_names_its_rows(
    training: Training, uninterrupted: Path, kind: str, what: str
) -> None:
    result = training.run_alone(script=FAULTY, FAULT_KIND=kind, FAULT_RANK=1, FAULT_BATCHES="5,6")
    assert result.returncode == 3, result.stderr[-3000:]
    (line,) = lines_with(result.stderr)
    corpus = open_corpus(training.corpus)
    batches = MicroBatches(corpus, BatchEquation(BATCH, MICRO_BATCH, 2, 2), rank=1, seed=0)
    rows = batches.global_batch(5)[1].tolist() if kind == "weight gradient" else batches.rows_of(5, 1)
    assert_names(line, "not-finite", "step 6", what, ", ".join(map(str, rows)))
    assert ("on rank 1" in line) == (kind != "weight gradient")
    assert training.newest().progress.step == 4
    training.assert_nothing_is_left()
    if kind == "gradient":
        training.finish()
        assert_same_end(training.run, uninterrupted)


@pytest.mark.full
def test_a_non_finite_gradient_in_bf16_is_not_an_overflow(training: Training) -> None:
    # DeepSpeed's bf16 optimiser at ZeRO stage 1 skips such steps, like fp16 overflows.
    training.config = write_config(training.run.parent / "bf16.json", {"bf16": {"enabled": True}})
    many = ",".join(map(str, range(4, STEPS)))
    result = training.run_alone(
        "--logging_steps", STEPS, script=FAULTY, FAULT_KIND="gradient", FAULT_BATCHES=many, FAULT_RANK=1
    )
    assert result.returncode == 3, result.stderr[-3000:]
    (line,) = lines_with(result.stderr)
    assert_names(line, "not-finite", "step 5", "gradient")


@needs_fp16
@pytest.mark.full
def test_fp16_overflows_are_counted_and_are_not_steps(training: Training) -> None:
    scale = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    training.config = write_config(training.run.parent / "fp16.json", {"fp16": scale})
    result = training.run_alone(script=FAULTY, FAULT_KIND="gradient", FAULT_RANK=1, FAULT_BATCHES="2,7,8")
    assert result.returncode == 0, result.stderr[-3000:]
    lines = read_metrics(training.run / "metrics.jsonl")
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    assert [line.skipped for line in lines] == [0] * 2 + [1] * 4 + [3] * (STEPS - 6)
    assert [line.loss_scale for line in lines] == [256] * 2 + [128] * 4 + [32] * (STEPS - 6)
    # The schedule counts only updates: after the warm-up it falls by the same amount at each step.
    falls = [before.lr - after.lr for before, after in itertools.pairwise(lines[4:])]
    assert falls == pytest.approx([lines[-1].lr] * len(falls), rel=1e-6)
    assert training.newest().progress.batches == STEPS + 3


@needs_fp16
@pytest.mark.full
@pytest.mark.parametrize("scaling", [{"initial_scale_power": 2, "hysteresis": 1}, chaos({"loss_scale": 64})])
def test_a_loss_scale_that_cannot_fall_ends_the_run(training: Training, scaling: dict[str, int]) -> None:
    training.config = write_config(training.run.parent / "fp16.json", {"fp16": {"enabled": True, **scaling}})
    faults = ",".join(map(str, range(4, 4 + STEPS)))
    result = training.run_alone(script=FAULTY, FAULT_KIND="gradient", FAULT_RANK=0, FAULT_BATCHES=faults)
    assert result.returncode == 3, result.stderr[-3000:]
    (line,) = lines_with(result.stderr)
    assert_names(line, "fp16-overflow", "loss scale")
    assert training.newest().progress.step == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_one_line_and_keeps_the_checkpoints(
    tiny_teacher_dir: Path, small_corpus_dir: Path, small_disk: Path, uninterrupted: Path
) -> None:
    training = Training(tiny_teacher_dir, small_corpus_dir, small_disk / "run")
    result = training.run_alone("--save_total_limit", 100)
    assert result.returncode == 2, result.stderr[-3000:]
    (line,) = lines_with(result.stderr)
    assert_names(line, "unwritable-output", str(small_disk))
    step = training.newest().progress.step
    assert 0 < step < STEPS
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    training.finish()
    # Until then the rank that failed last may have left unfinished files.
    assert not list(small_disk.rglob("*.incomplete"))
    assert_same_end(training.run, uninterrupted)


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    training: Training, uninterrupted: Path
) -> None:
    shutil.copytree(uninterrupted, training.run)
    shutil.rmtree(training.run / "student")
    newest = training.newest().path
    state = next(newest.glob("*optim_states.pt"))
    os.truncate(state, state.stat().st_size - 1)
    result = training.run_alone()
    assert result.returncode == 0, result.stderr[-3000:]
    lines = lines_with(result.stderr, "warning")
    assert str(newest) in lines[0]
    assert state.name in lines[0]
    assert "step_000000022" in lines[1]
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert_same_end(training.run, uninterrupted)
