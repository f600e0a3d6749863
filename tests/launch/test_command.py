"""The command ``distilspeed``: it finds its scripts, starts DeepSpeed's launcher, and names missing packages."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspeed.launcher import runner
from jobs import Job, cpu_environment, finish, start, training, wait_for_checkpoint, wait_until
from launcher import ROOT, error_lines, free_port
from training import processes_of
from user_errors import assert_names

import distilspeed
from distilspeed.launch.command import COMMANDS, LAUNCHER_OPTIONS, LAUNCHER_SWITCHES, split_options
from distilspeed.launch.train import build_parser

DISTILSPEED = [sys.executable, "-m", "distilspeed.launch.command"]
# Runs the command as if the packages of the first argument were not installed; prints whether torch was imported.
WITHOUT = """
import sys
sys.modules |= dict.fromkeys(sys.argv.pop(1).split(","))
from distilspeed.launch.command import main
try:
    main()
finally:
    print("torch" if "torch" in sys.modules else "no torch")
"""
# The extra [train], except packaging and tqdm, which torch's profiler and compiler use if installed.
OF_THE_TRAINER = [
    *("deepspeed", "transformers", "datasets", "huggingface_hub", "psutil", "pydantic", "tokenizers"),
    *("safetensors", "numpy", "pyarrow", "matplotlib"),
]


def distilspeed_command(*arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run([*DISTILSPEED, *arguments], folder)


def without(packages: list[str], *arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-c", WITHOUT, ",".join(packages), *arguments], folder)


def run(command: list[object], folder: Path) -> subprocess.CompletedProcess[str]:
    words = [str(part) for part in command]
    return subprocess.run(
        words, cwd=folder, env=cpu_environment(), capture_output=True, text=True, check=False
    )


def test_version_and_help_do_not_import_torch(tmp_path: Path) -> None:
    version = without(OF_THE_TRAINER, "--version", folder=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"distilspeed {distilspeed.__version__}\nno torch\n")
    printed = without(OF_THE_TRAINER, "--help", folder=tmp_path)
    assert printed.returncode == 0
    assert printed.stdout.endswith("\nno torch\n")
    for name, command in COMMANDS.items():
        assert [command.does in line for line in printed.stdout.splitlines() if line.startswith(name)] == [
            True
        ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["trian"], "bad-argument"), ([], "missing-argument"), (["--local"], "missing-argument")],
)
def test_an_unknown_command_is_one_line(arguments: list[str], code: str) -> None:
    result = distilspeed_command(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert_names(line, code, "distilspeed --help")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_is_one_line_that_names_the_command(command: str, tmp_path: Path) -> None:
    result = distilspeed_command(command, "--output_dir", "~/x", "--wrong", folder=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()  # train has not started the launcher, which would print more
    assert line.startswith("error: ")
    code = "bad-argument" if command in ("prepare", "profile") else "missing-argument"  # others need more
    assert_names(line, code, f"distilspeed {command} --help")


@pytest.mark.full
def test_a_script_runs_as_by_its_own_name(
    tiny_teacher_dir: Path, reference_text: Path, tmp_path: Path
) -> None:
    options = ["--text", reference_text, "--tokenizer", tiny_teacher_dir, "--seq_length", 64, "--num_proc", 2]
    result = distilspeed_command("prepare", *options, "--output_dir", "corpus", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "corpus" / "manifest.json").is_file()
    arguments = ["--teacher", tiny_teacher_dir, "--data_dir", "corpus", "--output_dir", "run"]
    result = distilspeed_command("plan", *arguments, "--deepspeed_config", "v100x8_fp16", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "global batch 4096 = micro-batch 32 x 128 accumulation steps x 1 ranks" in result.stdout
    assert not (tmp_path / "run").exists()
    result = distilspeed_command("plan", *arguments, "--deepspeed_config", "v100", folder=tmp_path)
    assert result.returncode == 2
    (line,) = error_lines(result)
    assert_names(line, "unreadable-config", "v100", "v100x8_fp16")


# --- without the extra [train] ----------------------------------------------------------------------------


FOLDERS = ["--teacher", "teacher", "--data_dir", "corpus", "--deepspeed_config", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], ("distilspeed train", "deepspeed", "distilspeed[train]")),
        (["plan", *FOLDERS, "--output_dir", "run"], ("distilspeed[train]",)),
        (["prepare", "--text", "a", "--tokenizer", "b", "--output_dir", "c"], ("distilspeed[train]",)),
        (["evaluate", *FOLDERS[:4], "--student", "a", "--output_dir", "b"], ("distilspeed[train]",)),
        (["benchmark", *FOLDERS], ("distilspeed[train]",)),
        (["profile", "--output_dir", "profile"], ("matplotlib", "--output_dir")),
    ],
    ids=["train", "plan", "prepare", "evaluate", "benchmark", "profile"],
)
def test_without_the_trainers_packages_one_line_names_what_to_install(
    arguments: list[str], named: tuple[str, ...], tmp_path: Path
) -> None:
    result = without(OF_THE_TRAINER, *arguments, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = error_lines(result)
    assert_names(line, "missing-package", *named)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_profiling_needs_only_torch_and_triton(tmp_path: Path) -> None:
    size = ["--tokens", 32, "--vocab_size", 100, "--hidden_size", 16, "--device", "cpu", "--repeats", 1]
    result = without(OF_THE_TRAINER, "profile", *size, "--peers", "none", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| weighted_distillation_loss " in result.stdout


# --- train -----------------------------------------------------------------------------------------------


def test_the_launchers_options_are_those_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser, args: parser)
    parser = runner.parse_args([])
    options = {option: action for action in parser._actions for option in action.option_strings}
    not_passed_on = {"-h", "--help", "--module", "--no_python", "--no_local_rank", "--autotuning"}
    assert options.keys() - not_passed_on == LAUNCHER_OPTIONS | LAUNCHER_SWITCHES
    assert {
        option for option, action in options.items() if action.nargs == 0
    } - not_passed_on == LAUNCHER_SWITCHES
    of_train = {option for action in build_parser()._actions for option in action.option_strings}
    assert not of_train & (LAUNCHER_OPTIONS | LAUNCHER_SWITCHES)


def test_the_launchers_options_are_found_anywhere() -> None:
    given = "--teacher t --num_gpus 2 --resume --quiet --master_port=1 --seed 3 -i localhost:0,1 --launcher_args=--x"
    for_launcher = "--num_gpus 2 --quiet --master_port=1 -i localhost:0,1 --launcher_args=--x"
    assert split_options(given.split()) == (
        for_launcher.split(),
        ["--teacher", "t", "--resume", "--seed", "3"],
    )
    assert split_options(["--num_gpus"]) == (["--num_gpus"], [])  # DeepSpeed reports the error


def start_training(folder: Path, arguments: list[str]) -> Job:
    own = ["--num_gpus", 2, *arguments, "--master_port", free_port()]
    environment = cpu_environment()
    if not torch.accelerator.is_available():
        del environment["DS_ACCELERATOR"]
    return start([*DISTILSPEED, "train", *own], environment, folder)


@pytest.mark.full
@pytest.mark.parametrize(
    ("send", "sent", "statuses"),
    [
        (os.kill, signal.SIGTERM, {-signal.SIGTERM}),
        (os.killpg, signal.SIGINT, {-signal.SIGINT, 1}),  # Ctrl-C goes to the terminal's processes
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_ends_the_job_as_under_deepspeed(
    send: Callable[[int, int], None],
    sent: signal.Signals,
    statuses: set[int],
    tiny_teacher_dir: Path,
    small_corpus_dir: Path,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    long = ["--max_steps", "2000"]
    job = start_training(tmp_path, [*training(tiny_teacher_dir, small_corpus_dir, run_dir), *long])
    wait_for_checkpoint(run_dir, job)
    send(job.pid, sent)
    status, _, errors = finish(job)
    assert status in statuses, errors[-3000:]
    wait_until(lambda: not processes_of(run_dir))
    assert [line for line in errors.splitlines() if line.startswith("stopped: ")], errors[-3000:]


@pytest.mark.full
def test_it_trains_on_two_ranks_and_returns_the_status_of_bad_input(
    tiny_teacher_dir: Path, small_corpus_dir: Path, tmp_path: Path
) -> None:
    arguments = [
        "--teacher",
        str(tiny_teacher_dir),
        "--data_dir",
        str(small_corpus_dir),
        "--output_dir",
        "run",
    ]
    arguments += ["--deepspeed_config", "cpu", "--max_steps", "2"]
    status, output, errors = finish(start_training(tmp_path, arguments))
    assert status == 0, errors[-3000:]
    assert "Setting accelerator to CPU" not in output + errors  # DeepSpeed's warning without DS_ACCELERATOR
    record = json.loads((tmp_path / "run" / "train_config.json").read_text())
    assert record["identity"]["train_batch_size"] == 16  # micro-batches of 8 on two ranks
    assert record["arguments"]["deepspeed_config"] == "cpu"
    status, _, errors = finish(start_training(tmp_path, arguments))
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert_names(line, "output-exists", "run", "--resume")
