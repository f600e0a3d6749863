"""launch/slurm.sbatch and launch/train.py under stand-ins for Slurm's and Open MPI's commands.

This machine is both of Slurm's nodes, with one task each.
"""

import os
import shutil
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest
from jobs import (
    Job,
    assert_same_end,
    cpu_environment,
    finish,
    start,
    training,
    wait_for_checkpoint,
    was_interrupted,
)
from launcher import ROOT
from user_errors import assert_names

SCRIPT = ROOT / "launch" / "slurm.sbatch"

SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 64
shift
for SLURM_PROCID in 0 1; do
  SLURM_LOCALID=0 SLURM_PROCID=$SLURM_PROCID "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" >"$SUBMITTED_FROM/tasks"
for _ in "${tasks[@]}"; do
  wait -n || { status=$?; kill "${tasks[@]}" 2>/dev/null; wait; exit $status; }
done
"""
# srun -n 2 COMMAND and mpirun -n 2 COMMAND, in a user's shell.
START_TASKS = """#!/usr/bin/env bash
[ "$1 $2" = "-n 2" ] || exit 64
shift 2
job=$$
for task in 0 1; do
  case $(basename "$0") in
    srun)
      export SLURM_JOB_ID=$job SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$task
      export SLURM_LOCALID=$task SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=node1 SLURM_JOB_NODELIST=node1
      ;;
    mpirun)
      export OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_RANK=$task
      export OMPI_COMM_WORLD_LOCAL_RANK=$task OMPI_MCA_ess_base_jobid=$job
      ;;
  esac
  "$@" &
done
wait -n && wait -n
"""
# Signals the tasks, not the batch shell.
SCANCEL = """#!/usr/bin/env bash
[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 64
kill $(cat "$SUBMITTED_FROM/tasks")
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show job $SLURM_JOB_ID") printf 'JobId=%s\\n   Command=%s --teacher x\\n   WorkDir=/\\n' "$3" "$SUBMITTED" ;;
  "show hostnames node[1-2]") printf '%s\\n' 127.0.0.1 node2 ;;
  "requeue $SLURM_JOB_ID") : >"$SUBMITTED_FROM/requeued" ;;
  *) exit 64 ;;
esac
"""


@pytest.mark.full
def test_requeued_before_its_time_limit_it_equals_an_uninterrupted_run(
    uninterrupted_run: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    arguments = training(tiny_teacher_dir, small_corpus_dir, Path("a run"))
    job = submit(tmp_path, arguments)
    wait_for_checkpoint(run, job)
    job.send_signal(signal.SIGUSR1)  # the USR1 of --signal, which only the batch shell gets
    status, _, errors = finish(job)
    assert status == 75, errors[-3000:]
    assert (tmp_path / "requeued").exists()
    (line,) = [line for line in errors.splitlines() if line.startswith("stopped: ")]
    assert_names(line, "stopped", "SIGTERM")
    assert was_interrupted(run)

    status, _, errors = finish(submit(tmp_path, arguments))
    assert status == 0, errors[-3000:]
    assert_same_end(run, uninterrupted_run)


@pytest.mark.full
def test_bad_input_is_one_line_and_the_jobs_status(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    arguments = [*training(tiny_teacher_dir, small_corpus_dir, Path("run")), "--train_batch_size", "129"]
    status, _, errors = finish(submit(tmp_path, arguments))
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "indivisible-batch", "train_batch_size 129", "128 and 160")


@pytest.mark.full
@pytest.mark.parametrize("command", ["srun", "mpirun"])
def test_tasks_are_the_ranks_of_one_job(
    command: str, uninterrupted_run: Path, tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    start_tasks = tmp_path / command
    start_tasks.write_text(START_TASKS)
    start_tasks.chmod(stat.S_IRWXU)
    train = [sys.executable, ROOT / "launch" / "train.py"]
    arguments = training(tiny_teacher_dir, small_corpus_dir, tmp_path / "run")
    unset = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in cpu_environment().items() if name not in unset}
    status, _, errors = finish(start([start_tasks, "-n", 2, *train, *arguments], environment, tmp_path))
    assert status == 0, errors[-3000:]
    assert_same_end(tmp_path / "run", uninterrupted_run)


@pytest.mark.parametrize(
    ("arguments", "status", "shown"), [(["--help"], 0, "sbatch"), (["--plan"], 2, "not a Slurm job")]
)
def test_outside_slurm_it_prints_help_or_an_error(
    arguments: list[str], status: int, shown: str, tmp_path: Path
) -> None:
    ended, output, errors = finish(start(["bash", SCRIPT, *arguments], cpu_environment(), tmp_path))
    assert ended == status
    assert shown in output + errors


def submit(folder: Path, arguments: list[str]) -> Job:
    """Run a copy of the script in the folder, as ``sbatch launch/slurm.sbatch ARGUMENTS`` does."""
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    shutil.copy(SCRIPT, folder / "slurm_script")
    environment = cpu_environment(
        PATH=f"{commands}:{os.environ['PATH']}",
        PYTHON=sys.executable,
        SLURM_JOB_ID=_job_number(),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_NTASKS=2,
        SLURM_SUBMIT_DIR=folder,
        SUBMITTED=SCRIPT,
        SUBMITTED_FROM=folder,
    )
    return start(["bash", folder / "slurm_script", *arguments], environment, folder)


def _job_number() -> int:
    """Return a job number whose port is free on this machine."""
    number = 4_000_000 + os.getpid()
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 15000 + number % 15000)):
                return number
        number += 1
