"""Measure the training step against the original recipe in eager PyTorch, taking turns on the same machine.

    python launch/benchmark.py --deepspeed_config ds_configs/cpu.json --teacher DIR --data_dir DIR

The baseline is DistilBERT's original recipe: pieces of text in padded batches of similar length, masked_select
losses, .item() at every micro-batch, torch.autocast in half precision. Prints the real tokens per second of both, MFU
against a matrix product measured in the same process, the tensors' peak memory, and the parts of the step's time.
"""

import sys
import tempfile
from argparse import SUPPRESS
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.arguments import (
    LauncherArguments,
    setting,
    whole_numbers,
)
from distilspeed.trainer.job.command import fast_imports, quiet_libraries, run_command
from distilspeed.trainer.training.arguments import StepArguments, TrainArguments

if TYPE_CHECKING:
    from distilspeed.trainer.throughput.report import BenchmarkReport
    from distilspeed.trainer.training.run import Run

# Steps of the schedule; no benchmark reaches its end.
STEPS_OF_SCHEDULE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class BenchmarkArguments(StepArguments):
    """The command line of ``launch/benchmark.py``; ``contestant`` and ``laps`` are for its child processes."""

    restrict_ce_to_mask: bool = setting(False, help="soft targets on masked tokens only, in our step")
    as_v100: bool = setting(False, help="apply the limits of a V100 with 16 GiB to a newer GPU")
    rounds: int = setting(5, at_least=1, help="rounds to measure")
    ranks: tuple[int, ...] = setting(
        (),
        at_least=1,
        parse=whole_numbers,
        metavar="N,N",
        help="also measure with these numbers of ranks on this machine",
    )
    output: Path | None = setting(None, metavar="FILE", help="write the results as JSON")
    check: Path | None = setting(
        None,
        metavar="FILE",
        help="fail if the ratio is more than 10 %% below the one in FILE, an earlier --output",
    )
    contestant: Literal["ours", "eager"] | None = setting(None, help=SUPPRESS)
    laps: str | None = setting(None, help=SUPPRESS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher == "none":
            raise UserError("missing-argument", "the benchmark measures distillation; give a --teacher")

    def training(self, output_dir: Path) -> TrainArguments:
        of_step = {each.name: getattr(self, each.name) for each in fields(StepArguments)}
        return TrainArguments(**of_step, output_dir=output_dir, max_steps=STEPS_OF_SCHEDULE)


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    parser = CommandParser(
        BenchmarkArguments, LauncherArguments, prog="launch/benchmark.py", description=__doc__
    )
    arguments: BenchmarkArguments = parser.parse()[0]
    if arguments.as_v100:
        from distilspeed.trainer.throughput.v100 import limit_to_v100

        limit_to_v100()
    run = _prepare(arguments)
    if arguments.contestant:
        from distilspeed.trainer.throughput.contestants import serve

        serve(arguments.contestant, run, arguments.laps and arguments.laps.split(","))
        return
    _check_before_measuring(run, arguments)
    report = _measure(run, arguments)
    print(report.table())
    _keep(report, arguments)


def _prepare(arguments: BenchmarkArguments) -> "Run":
    # After the parsing, because importing torch takes seconds.
    with fast_imports():
        from distilspeed.trainer.objective.registry import take_terms
        from distilspeed.trainer.training.run import prepare_run

    quiet_libraries()
    terms = take_terms({"restrict_ce_to_mask": True}) if arguments.restrict_ce_to_mask else None
    with tempfile.TemporaryDirectory() as folder:  # nothing is written there
        return prepare_run(arguments.training(Path(folder)), terms)


def _check_before_measuring(run: "Run", arguments: BenchmarkArguments) -> None:
    from distilspeed.trainer.engine.config_batch import resolve_batch_equation
    from distilspeed.trainer.engine.config_file import read_deepspeed_config
    from distilspeed.trainer.files import check_new_file
    from distilspeed.trainer.throughput.report import read_stored

    if run.corpus.manifest.objective == "causal":
        raise UserError(
            "unsupported-model",
            f"the benchmark's baseline trains masked language models, and {run.corpus.path} is for causal ones; "
            "choose a corpus and a teacher of BERT's kind",
        )
    config = read_deepspeed_config(arguments.deepspeed_config)
    for count in arguments.ranks:
        resolve_batch_equation(
            config, count, arguments.train_batch_size, arguments.per_device_train_batch_size
        )
    if arguments.output:
        check_new_file(arguments.output)
    if arguments.check:
        read_stored(arguments.check)


def _measure(run: "Run", arguments: BenchmarkArguments) -> "BenchmarkReport":
    from distilspeed.trainer.throughput.measurement import SECONDS_PER_TURN, compare, measure_scaling
    from distilspeed.trainer.throughput.report import BenchmarkReport

    seconds = SECONDS_PER_TURN[run.process.device.type]
    comparison = compare([sys.executable, *sys.argv], arguments.rounds, seconds)
    return BenchmarkReport.of(run, comparison, measure_scaling(sys.argv, arguments.ranks))


def _keep(report: "BenchmarkReport", arguments: BenchmarkArguments) -> None:
    from distilspeed.trainer.files import write_text, writing
    from distilspeed.trainer.throughput.report import check_against

    if arguments.output:
        with writing(arguments.output):
            write_text(arguments.output, report.to_json())
    if arguments.check:
        check_against(arguments.check, report)


if __name__ == "__main__":
    run_command(main)
