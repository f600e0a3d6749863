"""Every command sets torch's environment before torch is imported, and expands ``~`` to the home folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launcher import ROOT

from distilspeed.trainer.job.command import PlainParser
from distilspeed.trainer.job.environment import SETTINGS, prepare_environment, unprepared_environment

# Runs a command until it imports torch, and prints the environment at that moment.
PROBE = """
import json, os, runpy, sys

class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("AT IMPORT", json.dumps(dict(os.environ)), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Probe())
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FOLDERS = ["--teacher", "none", "--data_dir", "none", "--output_dir", "none"]
COMMANDS = {
    "benchmark.py": ["--deepspeed_config", "none", "--teacher", "none", "--data_dir", "none"],
    "benchmark_preparation.py": ["--text", "none", "--tokenizer", "none"],
    "benchmarks/zero_stages.py": ["1"],
    "ablation.py": [*FOLDERS, "--deepspeed_config", "none", "--max_steps", "1"],
    "evaluate.py": [*FOLDERS, "--student", "none"],
    "finetune.py": ["--model", "none", "--task", "none", "--output_dir", "none"],
    "gpu_check.py": ["--output_dir", "none", "--smoke"],
    "profile_kernels.py": [],
    "train.py": ["--deepspeed_config", "none", *FOLDERS],
}
WITHOUT_TORCH = {"command.py", "prepare_data.py", "quickstart_data.py", "benchmarks/task_from_text.py"}


def test_every_command_is_tested() -> None:
    launch = ROOT / "launch"
    found = {
        str(path.relative_to(launch)) for path in (*launch.glob("*.py"), *launch.glob("benchmarks/*.py"))
    }
    assert found == COMMANDS.keys() | WITHOUT_TORCH


@pytest.mark.parametrize("command", COMMANDS)
def test_torchs_settings_are_set_before_it_is_imported(command: str, tmp_path: Path) -> None:
    unset = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    own = {"OMP_WAIT_POLICY": "ACTIVE"}
    for given, expected in (({}, SETTINGS), (own, SETTINGS | own)):
        done = subprocess.run(
            [sys.executable, "-c", PROBE, ROOT / "launch" / command, *COMMANDS[command]],
            capture_output=True,
            text=True,
            env=unset | given,
            cwd=tmp_path,
            check=False,
        )
        assert "AT IMPORT" in done.stdout, done.stderr
        found = json.loads(done.stdout.partition("AT IMPORT")[2])
        assert {name: found.get(name) for name in SETTINGS} == expected


def test_settings_of_a_command_can_be_removed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """launch/benchmark.py runs the eager recipe without this project's settings."""
    monkeypatch.setattr(os, "environ", {"OMP_WAIT_POLICY": "ACTIVE", "HOME": "/home/me"})
    prepare_environment()
    assert os.environ.keys() > unprepared_environment().keys()
    assert unprepared_environment() == {"OMP_WAIT_POLICY": "ACTIVE", "HOME": "/home/me"}


def test_every_parser_of_a_command_is_ours() -> None:
    for path in (ROOT / "launch").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "ArgumentParser(" not in text, path
        assert re.search(r"(Command|Plain)Parser\(", text), path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"type": Path}, Path("/home/me/x")),
        ({}, "/home/me/x"),
        ({"type": Path, "nargs": "+"}, [Path("/home/me/x")]),
        ({"action": "append"}, ["/home/me/x"]),
    ],
)
def test_home_is_expanded_after_an_equals_sign(
    options: dict[str, object], expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = PlainParser()
    parser.add_argument("--path", **options)
    assert parser.parse_args(["--path=~/x"]).path == expected


def test_home_is_expanded_in_argument_groups_and_only_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = PlainParser()
    parser.add_mutually_exclusive_group().add_argument("--path", type=Path, default=Path("a"))
    parser.add_argument("--name")
    options = parser.parse_args(["--path", "~/x", "--name", "a/~"])
    assert (options.path, options.name) == (Path("/home/me/x"), "a/~")
