"""The command ``distilspeed``: short names for the scripts of this folder; ``train`` starts DeepSpeed's launcher."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import NamedTuple, NoReturn

from distilspeed import __version__
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.command import PlainParser, run_command


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        script: the module of ``distilspeed.launch`` that runs it.
        does: one line of help.
    """

    script: str
    does: str


COMMANDS = {
    "prepare": Command("prepare_data", "prepare a corpus: pack text or data sets into rows of tokens"),
    "train": Command("train", "distil a teacher on the GPUs of this host (DeepSpeed's launcher)"),
    "evaluate": Command("evaluate", "compare a student with its teacher: quality, size, latency"),
    "finetune": Command("finetune", "fine-tune a model on a task, with a fine-tuned teacher if given"),
    "ablation": Command("ablation", "train and evaluate a student without each loss, and without a teacher"),
    "plan": Command("train", "print batch equation, memory and FLOPs of a run without training"),
    "profile": Command("profile_kernels", "measure the fused losses; needs only torch and triton"),
    "benchmark": Command("benchmark", "measure the training step against the original recipe"),
}

# DeepSpeed's launcher options, accepted anywhere among train's own, which have other names. Left out are the options
# that change what is started (--module, --no_python, --no_local_rank, --autotuning).
LAUNCHER_OPTIONS = frozenset(
    {
        *("-H", "--hostfile", "-i", "--include", "-e", "--exclude", "--num_nodes"),
        *("--num_gpus", "--num_accelerators", "--master_addr", "--master_port", "--node_rank"),
        *("--launcher", "--launcher_args", "--ssh_port", "--venv_script", "--enable_each_rank_log"),
        *("--bind_core_list", "--log_level"),
    }
)
LAUNCHER_SWITCHES = frozenset(
    {"--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid", "--bind_cores_to_rank", "-q", "--quiet"}
)


def main() -> NoReturn:
    run_command(_run)


def _run() -> None:
    parser = PlainParser(
        prog="distilspeed",
        usage="distilspeed COMMAND [options]",
        description="\n".join(f"{name:<12}{command.does}" for name, command in COMMANDS.items()),
        epilog="distilspeed COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"distilspeed {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command, options = parser.parse_args(sys.argv[1:2]).command, sys.argv[2:]
    PlainParser.typed = f"distilspeed {command}"
    try:
        if command == "train":
            _launch_training(options)
        else:
            _run_script(command, options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "distilspeed"):
            raise
        raise UserError(
            "missing-package",
            f"{PlainParser.typed} needs {package}, which is not installed; install distilspeed[train]",
        ) from error


def _run_script(command: str, options: Sequence[str]) -> None:
    script = import_module(f"distilspeed.launch.{COMMANDS[command].script}")
    # The script's path, as under `python -m`: some scripts start themselves again.
    sys.argv = [str(script.__file__), *options, *(["--plan"] if command == "plan" else [])]
    script.main()


def _launch_training(given: Sequence[str]) -> NoReturn:
    """Replace this process by ``deepspeed --module distilspeed.launch.train``, with its signals and exit statuses."""
    if find_spec("deepspeed") is None:
        raise ModuleNotFoundError(name="deepspeed")
    from distilspeed.launch.train import build_parser

    for_launcher, options = split_options(given)
    parser = build_parser()
    parser.epilog = (
        f"options of DeepSpeed's launcher: {' '.join(sorted(LAUNCHER_OPTIONS | LAUNCHER_SWITCHES))}"
    )
    parser.parse_args(options)  # report a wrong option here, before any rank starts
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every process warns about the missing GPU
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *for_launcher]
    os.execv(sys.executable, [*launcher, "--module", "distilspeed.launch.train", *options])


def split_options(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the options of DeepSpeed's launcher with their values, and all others."""
    for_launcher: list[str] = []
    others: list[str] = []
    arguments = iter(given)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in LAUNCHER_OPTIONS:
            for_launcher += [argument, *islice(arguments, 0 if equals else 1)]
        elif name in LAUNCHER_SWITCHES:
            for_launcher.append(argument)
        else:
            others.append(argument)
    return for_launcher, others


if __name__ == "__main__":
    main()
