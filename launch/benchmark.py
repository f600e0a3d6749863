"""Measure the training step against the original recipe done eagerly, in turns on the same machine.

    python launch/benchmark.py --deepspeed_config ds_configs/cpu.json --teacher DIR --data_dir DIR

The baseline is DistilBERT's original recipe in eager PyTorch: pieces of text in padded batches of about one length,
masked_select losses, .item() at every micro-batch; in half precision with torch.autocast. Prints real tokens per second
of both, MFU against a matrix product measured in the same process, peak memory of tensors, and where the step's time
goes.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.command import CommandParser, quiet_libraries, run_command

if TYPE_CHECKING:
    from distilspeed.trainer.throughput.report import BenchmarkReport
    from distilspeed.trainer.training.run import Run

# A schedule that no benchmark comes to the end of.
STEPS_OF_SCHEDULE = 1_000_000


def rank_counts(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    options = vars(_build_parser().parse_args())
    rounds, ranks, output, check, contestant, laps = (
        options.pop(name) for name in ("rounds", "ranks", "output", "check", "contestant", "laps")
    )
    if options.pop("as_v100"):
        from distilspeed.trainer.throughput.v100 import limit_to_v100

        limit_to_v100()
    run = _prepare(options)
    if contestant:
        from distilspeed.trainer.throughput.contestants import serve

        serve(contestant, run, laps and laps.split(","))
        return
    _check_before_measuring(run, rounds, ranks, output, check)
    report = _measure(run, rounds, ranks)
    print(report.table())
    _keep(report, output, check)


def _prepare(options: dict[str, Any]) -> "Run":
    for not_an_argument in ("debug", "local_rank"):
        options.pop(not_an_argument)
    # After the parsing, because importing torch takes seconds.
    from distilspeed.trainer.objective.registry import take_terms
    from distilspeed.trainer.training.arguments import TrainArguments
    from distilspeed.trainer.training.run import prepare_run

    quiet_libraries()
    if options["teacher"] == "none":
        raise UserError("missing-argument", "a benchmark compares distillations; give a --teacher")
    terms = take_terms(options)
    with tempfile.TemporaryDirectory() as folder:  # nothing is written there
        arguments = TrainArguments(**options, output_dir=Path(folder), max_steps=STEPS_OF_SCHEDULE)
        return prepare_run(arguments, terms)


def _check_before_measuring(
    run: "Run", rounds: int, ranks: tuple[int, ...], output: Path | None, check: Path | None
) -> None:
    from distilspeed.trainer.engine.config import read_deepspeed_config, resolve_batch_equation
    from distilspeed.trainer.files import check_new_file
    from distilspeed.trainer.throughput.report import read_stored

    for name, number in (("rounds", rounds), *(("ranks", count) for count in ranks)):
        if number < 1:
            raise UserError("bad-argument", f"--{name} {number} is below 1; give at least 1")
    arguments = run.arguments
    config = read_deepspeed_config(arguments.deepspeed_config)
    for count in ranks:
        resolve_batch_equation(
            config, count, arguments.train_batch_size, arguments.per_device_train_batch_size
        )
    if output:
        check_new_file(output)
    if check:
        read_stored(check)


def _measure(run: "Run", rounds: int, ranks: tuple[int, ...]) -> "BenchmarkReport":
    from distilspeed.trainer.throughput.measurement import SECONDS_PER_TURN, compare, measure_scaling
    from distilspeed.trainer.throughput.report import BenchmarkReport

    seconds = SECONDS_PER_TURN[run.process.device.type]
    comparison = compare([sys.executable, *sys.argv], rounds, seconds)
    return BenchmarkReport.of(run, comparison, measure_scaling(sys.argv, ranks))


def _keep(report: "BenchmarkReport", output: Path | None, check: Path | None) -> None:
    from distilspeed.trainer.files import write_text
    from distilspeed.trainer.throughput.report import check_against

    if output:
        try:
            write_text(output, report.to_json())
        except OSError as error:
            raise UserError(
                "unwritable-output", f"cannot write {output}: {error.strerror}; check --output"
            ) from error
    if check:
        check_against(check, report)


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="launch/benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--deepspeed_config",
        type=Path,
        required=True,
        help="as for training: precision, ZeRO stage, optimiser",
    )
    add("--teacher", required=True, help="hub id or folder of a BERT masked language model")
    add("--data_dir", type=Path, required=True, help="corpus made by launch/prepare_data.py")
    add("--train_batch_size", type=int, help='rows per optimiser step, where the config says "auto"')
    add("--per_device_train_batch_size", type=int, help='rows per micro-batch, where the config says "auto"')
    add(
        "--dataloader_num_workers",
        type=int,
        help="processes that mask and collate; default 2 on a GPU, 0 on a CPU",
    )
    add("--restrict_ce_to_mask", action="store_true", help="soft targets on masked tokens only, in our step")
    add("--compile", action="store_true", help="compile the encoders (torch.compile), in our step")
    add("--as_v100", action="store_true", help="under the limits of a V100 of 16 GiB, on a newer GPU")
    add("--rounds", type=int, default=5, help="turns of each; default 5")
    add(
        "--ranks",
        type=rank_counts,
        default=(),
        metavar="N,N",
        help="also run on so many ranks of this machine",
    )
    add("--output", type=Path, metavar="FILE", help="write the results as JSON")
    add(
        "--check",
        type=Path,
        metavar="FILE",
        help="fail if the ratio is more than 10 %% below that of this earlier --output",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--contestant", choices=("ours", "eager"), help=argparse.SUPPRESS)
    add("--laps", help=argparse.SUPPRESS)
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    run_command(main)
