"""kill -9 at random moments of a run, then --resume: the result equals that of an uninterrupted run.

The moments are derived from a seed. Two runs with a few kills are part of every test run; the campaign is marked
``chaos``. With DISTILSPEED_CHAOS_REPORT=FILE every kill appends a line of JSON to FILE.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest
from jobs import Job, assert_same_end, cpu_environment, finish, start, wait_until
from launcher import ROOT
from training import SECONDS_TO_END, STEPS, Training, processes_of

SEED = 2019
KILLS_BEFORE_EXPORT = ("startup", "step", "save", "save", "step")
VICTIMS = ("rank 0", "rank 1", "launcher", "deepspeed", "everything")
RUNS_OF_CAMPAIGN = 8


@dataclass(frozen=True)
class Kill:
    """A kill: its victim, its moment and its outcome."""

    victim: str
    moment: str
    step: int  # the last reported step
    status: int  # exit status of the deepspeed command
    seconds: float  # until no process of the job was left


def last_step(run: Path) -> int:
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def wait_for_moment(moment: str, run: Path, job: Job, chance: random.Random) -> None:
    """Wait for the moment, or for the job's end."""
    if moment == "startup":
        wait_until(lambda: "rank 1" in processes_of(run), job)
        time.sleep(chance.uniform(0, 8))
        return
    reached = STEPS if moment == "export" else min(last_step(run) + chance.randint(1, 3), STEPS - 2)
    folder, name, delay = {
        "export": (run, "student.incomplete-*", 0.05),
        "save": (run / "checkpoints", "*.incomplete", 0.03),
        "step": (run / "checkpoints", "step_*", 0.3),
    }[moment]
    wait_until(lambda: last_step(run) >= reached or job.poll() is not None)
    while not any(folder.glob(name)) and job.poll() is None:  # too short to be found between two sleeps
        pass
    time.sleep(chance.uniform(0, delay))


def kill_once(training: Training, moment: str, chance: random.Random) -> Kill | None:
    """Start or resume the training and kill it; None if it ended before the kill."""
    run, job = training.run, training.start("--logging_steps", 1, "--ddp_timeout", SECONDS_TO_END)
    victim = chance.choice(VICTIMS)
    wait_for_moment(moment, run, job, chance)
    if job.poll() is not None:
        status, _, errors = finish(job)
        assert status == 0, errors[-3000:]
        return None
    step, began = last_step(run), time.monotonic()
    if victim == "everything":
        os.killpg(job.pid, signal.SIGKILL)
    elif victim in (alive := processes_of(run)):
        alive[victim].kill()
    wait_until(lambda: not processes_of(run), seconds=SECONDS_TO_END)
    seconds = time.monotonic() - began
    status, _, errors = finish(job)
    # `deepspeed` returns 0 if its launcher was killed: it returns only statuses above 0, and that one is -9.
    assert status != 0 or victim == "launcher" or (run / "student").exists(), errors[-3000:]
    return Kill(victim, moment, step, status, round(seconds, 2))


def report(kills: list[Kill]) -> None:
    if path := os.environ.get("DISTILSPEED_CHAOS_REPORT"):
        with Path(path).open("a") as file:
            file.writelines(json.dumps(asdict(kill)) + "\n" for kill in kills)


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another user's process with a command line similar to ours."""
    program = "import time; time.sleep(3600)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "deepspeed.launcher.launch", "launch/train.py"]
    )
    yield process
    assert process.poll() is None
    process.kill()
    process.wait()


def kill_and_resume(seed: int, moments: tuple[str, ...], training: Training, reference: Path) -> None:
    chance = random.Random(f"{SEED} {seed}")
    kills: list[Kill] = []
    for moment in moments:
        kill = kill_once(training, moment, chance)
        kills += [kill] * (kill is not None)
        if (training.run / "student").exists():
            break
    training.finish()
    assert_same_end(training.run, reference)
    report(kills)


@pytest.mark.usefixtures("bystander")
def test_a_few_kills(training: Training, uninterrupted: Path) -> None:
    kill_and_resume(0, ("save", "export"), training, uninterrupted)


@pytest.mark.chaos
@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("seed", range(1, 1 + RUNS_OF_CAMPAIGN))
def test_campaign(training: Training, uninterrupted: Path, seed: int) -> None:
    moments = random.Random(f"{SEED} {seed} moments").sample(KILLS_BEFORE_EXPORT, len(KILLS_BEFORE_EXPORT))
    kill_and_resume(seed, (*moments, "export"), training, uninterrupted)


def contents(corpus: Path) -> dict[str, str]:
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(corpus.rglob("*"))
        if path.is_file()
    }


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def kill_and_prepare(seed: int, kills: int, text: Path, tokenizer: Path, folder: Path) -> None:
    """Kill the preparation of a corpus, or one of its workers, and resume until the corpus is complete."""
    chance = random.Random(f"{SEED} {seed} preparation")
    long_text = folder / "long.txt"
    long_text.write_text(text.read_text(encoding="utf-8") * 5, encoding="utf-8")

    def command(output: Path) -> list[object]:
        options = {"--text": long_text, "--tokenizer": tokenizer, "--seq_length": 64, "--output_dir": output}
        script = [sys.executable, ROOT / "launch" / "prepare_data.py", "--num_proc", 2, "--resume"]
        return [*script, *(part for pair in options.items() for part in pair)]

    began = time.monotonic()
    status, _, errors = finish(start(command(folder / "whole"), cpu_environment(), folder))
    whole_took = time.monotonic() - began
    assert status == 0, errors
    done: list[Kill] = []
    while len(done) < kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)  # from a build that ended before its kill
        victim = chance.choice(("everything", "main process", "worker"))
        job = start(command(folder / "killed"), cpu_environment(), folder)
        time.sleep(chance.uniform(0.1, 0.8) * whole_took)
        if job.poll() is not None:
            assert finish(job)[0] == 0
            continue
        began = time.monotonic()
        main = psutil.Process(job.pid)
        family = [main, *main.children(recursive=True)]
        if victim == "everything":
            os.killpg(job.pid, signal.SIGKILL)
        else:
            (family[-1] if victim == "worker" else main).kill()
        status = finish(job)[0]
        # Zombies that wait for init do not count.
        wait_until(lambda family=family: not any(map(is_alive, family)), seconds=SECONDS_TO_END)
        done.append(Kill(victim, "preparation", 0, status, round(time.monotonic() - began, 2)))
        assert status != 0 or (folder / "killed").exists()  # 0 if the killed worker had no work left
    if not (folder / "killed").exists():
        assert finish(start(command(folder / "killed"), cpu_environment(), folder))[0] == 0
    assert contents(folder / "killed") == contents(folder / "whole")
    report(done)


def test_a_few_kills_of_a_preparation(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path
) -> None:
    kill_and_prepare(0, 2, reference_text, small_tokenizer_dir, tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", [1, 2])
def test_campaign_against_preparation(
    reference_text: Path, small_tokenizer_dir: Path, tmp_path: Path, seed: int
) -> None:
    kill_and_prepare(seed, 5, reference_text, small_tokenizer_dir, tmp_path)
