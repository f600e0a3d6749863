"""Arguments: a dataclass defines the command line, and enforces its limits in Python, too."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from user_errors import raises_user_error

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.arguments import Settings, setting, whole_numbers
from distilspeed.trainer.job.parser import CommandParser

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, kw_only=True)
class Example(Settings):
    name: str = setting(help="what it is called")
    output_dir: Path | None = setting(None, metavar="DIR", help="made by this command")
    text: tuple[Path, ...] = setting((), metavar="FILE", help="to read")
    task: tuple[str, ...] = setting((), action="append", help="to do")
    layers: tuple[int, ...] | None = setting(None, at_least=0, parse=whole_numbers, help="to take")
    parts: tuple[str, ...] = setting(("a", "b"), action="store", choices=("a", "b"), help="of it")
    device: Literal["cpu", "cuda"] = setting("cpu", help="to use")
    max_steps: int | None = setting(None, above=0, one_of="length", help="to take")
    epochs: float = setting(3.0, above=0, one_of="length", help="to take")
    share: float = setting(0.5, above=0, below=1, help="of all")
    seed: int = setting(0, at_least=0, at_most=4_000_000, help="of chance")
    plan: bool = setting(False, help="do nothing")
    workers: int | None = setting(None, help="default 2 on a GPU")


@dataclass(frozen=True)
class Other(Settings):
    weight: float = setting(5e-4, help="of it")


def parser() -> CommandParser:
    return CommandParser(Example, Other, prog="example", description="An example.")


def test_an_empty_command_line_gives_the_defaults() -> None:
    assert parser().parse(["--name", "x"]) == (Example(name="x"), Other())


def test_every_kind_of_field_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    line = "--name=~/x --output_dir=~/y --text a ~/b --text c --task d --task e --layers 0,2 --parts b "
    line += "--device cuda --max_steps 4 --share .25 --seed 1 --plan --workers 0 --weight 1 --debug"
    example, other = parser().parse(line.split())
    assert example == Example(
        name="/home/me/x",
        output_dir=Path("/home/me/y"),
        text=(Path("a"), Path("/home/me/b"), Path("c")),
        task=("d", "e"),
        layers=(0, 2),
        parts=("b",),
        device="cuda",
        max_steps=4,
        share=0.25,
        seed=1,
        plan=True,
        workers=0,
    )
    assert other == Other(weight=1.0)
    assert parser().parse(["--name", "x", "--text", "a"])[0].text == (Path("a"),), "parsers share values"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: --name;"),
        ("--name x --max_step 1", "unrecognized arguments: --max_step 1;"),
        ("--name x --max-steps 1", "unrecognized arguments: --max-steps 1;"),
        ("--name x --plan True", "unrecognized arguments: True;"),
        ("--name x --no_plan", "unrecognized arguments: --no_plan;"),
        ("--name x --task a b", "unrecognized arguments: b;"),
        ("--name x --max_steps 1 --epochs 1", "argument --epochs: not allowed with argument --max_steps;"),
        ("--name x --max_steps 1.5", "argument --max_steps: invalid int value: '1.5';"),
        ("--name x --layers a", "argument --layers: invalid whole_numbers value: 'a';"),
        ("--name x --parts c", "argument --parts: invalid choice: 'c'"),
        ("--name x --device tpu", "argument --device: invalid choice: 'tpu'"),
    ],
)
def test_an_invalid_command_line_is_reported_in_one_sentence(line: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        parser().parse(line.split())
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith("; see example --help")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_steps": 0}, "--max_steps must be above 0"),
        ({"share": 1.0}, "--share must be above 0 and below 1"),
        ({"share": float("nan")}, "--share is nan; give a finite number"),
        ({"epochs": float("inf")}, "--epochs is inf; give a finite number"),
        ({"seed": 4_000_001}, "--seed must be at least 0 and at most 4,000,000"),
        ({"layers": (0, -1)}, "--layers must be at least 0"),
    ],
    ids=str,
)
def test_limits_hold_in_python_and_on_the_command_line(wrong: dict[str, Any], message: str) -> None:
    with raises_user_error("bad-argument", message):
        Example(name="x", **wrong)
    ((name, value),) = wrong.items()
    text = ",".join(map(str, value)) if isinstance(value, tuple) else value
    with raises_user_error("bad-argument", message):
        parser().parse(["--name", "x", f"--{name}={text}"])


def test_the_help_names_each_flag_and_default_once() -> None:
    text = " ".join(parser().format_help().split("options:")[1].split())
    for part in (
        "--output_dir DIR made by this command --text FILE",
        "--max_steps MAX_STEPS to take --epochs EPOCHS to take (default 3) --share",
        "--parts {a,b} [{a,b} ...] of it (default a b)",
        "--seed SEED of chance (default 0) --plan do nothing --workers WORKERS default 2 on a GPU",
        "--weight WEIGHT of it (default 0.0005) --debug",
    ):
        assert part in text


# --- imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("distilspeed.launch.train import build_parser; build_parser()", "torch"),
        ("distilspeed.trainer.evaluation.arguments import EvaluateArguments", "transformers"),
        ("distilspeed.trainer.corpus.arguments import CorpusArguments", "transformers"),
        ("distilspeed.kernels.profiling.settings import ProfileSettings", "torch"),
    ],
)
def test_slow_packages_are_not_imported_for_arguments(program: str, absent: str) -> None:
    code = f"import sys; from {program}; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tokenising_process_imports_the_command_without_a_parser() -> None:
    """A spawned process runs the command's file under the name ``__mp_main__``."""
    script = str(ROOT / "launch" / "prepare_data.py")
    code = f"import runpy, sys; runpy.run_path({script!r}, run_name='__mp_main__'); "
    code += "sys.exit(bool({'transformers', 'torch'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
