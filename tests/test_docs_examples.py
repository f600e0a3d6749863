"""Examples in README and docs: Python runs, and command lines are ones that the commands take."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, FillMaskPipeline

from distilspeed.trainer.job.command import PlainParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|deepspeed(?: --num_gpus \d+)?) launch/(\w+\.py) (.*)")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def command_lines() -> list[tuple[str, str]]:
    """Script and arguments of the complete command lines; "…" stands for arguments that are left out."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if (match := COMMAND.match(line)) and "…" not in line:
                    found.append((match[1], match[2].replace("corpora/wikipedia_shards/*", "one two")))
    return found


class ParsedError(Exception):
    """Ends a command where it has parsed its arguments."""


@pytest.mark.parametrize(("script", "arguments"), command_lines())
def test_a_command_line_is_one_that_the_command_takes(
    script: str, arguments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_args = PlainParser.parse_args

    def stop(parser: PlainParser, *given: Any) -> None:
        parse_args(parser, *given)
        raise ParsedError

    monkeypatch.setattr(PlainParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments, comments=True)])
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / "launch" / script), run_name="__main__")


def test_every_command_has_an_example() -> None:
    shown = {script for script, _ in command_lines()}
    assert {"prepare_data.py", "train.py", "evaluate.py", "benchmark.py", "profile_kernels.py"} <= shown


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "losses.md"], ids=lambda page: page.name
)
def test_the_losses_in_a_training_step(page: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    names: dict[str, Any] = {
        "torch": torch,
        "student": BertForMaskedLM(config),
        "teacher": BertForMaskedLM(config),
        "inputs": inputs,
        "labels": inputs["input_ids"].where(torch.rand(2, 7) < 0.5, -100),
        "attention_mask": inputs["attention_mask"],
    }
    (block,) = (block for block in blocks(page, "python") if "distillation_loss(" in block)
    exec(block, names)
    names["loss"].backward()
    assert all(weight.grad is not None for weight in names["student"].bert.encoder.parameters())


def test_the_student_in_a_pipeline(
    tiny_teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "distilbert").mkdir(parents=True)
    (tmp_path / "runs" / "distilbert" / "student").symlink_to(tiny_teacher_dir)
    monkeypatch.chdir(tmp_path)
    answers = []
    call = FillMaskPipeline.__call__

    def note(pipeline: FillMaskPipeline, *given: Any) -> Any:
        answers.append(call(pipeline, *given))
        return answers[-1]

    monkeypatch.setattr(FillMaskPipeline, "__call__", note)
    (block,) = (block for block in blocks(ROOT / "README.md", "python") if "pipeline(" in block)
    exec(block, {})
    assert len(answers[0]) == 5
