"""Distil a teacher into its half-depth student under DeepSpeed.

deepspeed launch/train.py --deepspeed_config ds_configs/cpu.json --teacher DIR --data_dir DIR --output_dir DIR
"""

from typing import TYPE_CHECKING

from distilspeed.trainer.job.arguments import LauncherArguments
from distilspeed.trainer.job.command import fast_imports, quiet_libraries, run_command
from distilspeed.trainer.job.environment import prepare_environment
from distilspeed.trainer.job.parents import end_with_launcher
from distilspeed.trainer.job.scheduler import take_place_from_scheduler
from distilspeed.trainer.objective.registry import TERMS
from distilspeed.trainer.training.arguments import TrainArguments

if TYPE_CHECKING:
    from distilspeed.trainer.job.parser import CommandParser


def build_parser() -> "CommandParser":
    from distilspeed.trainer.job.parser import CommandParser

    return CommandParser(
        TrainArguments, LauncherArguments, *TERMS, prog="launch/train.py", description=__doc__
    )


def main() -> None:
    take_place_from_scheduler()  # before any output, because only rank 0 prints
    parser = build_parser()
    arguments, launcher, *terms = parser.parse()
    end_with_launcher(launcher.was_launched)

    prepare_environment(arguments.full_determinism)
    # After the parsing, because importing torch and DeepSpeed takes seconds.
    with fast_imports():
        from distilspeed.trainer.training.hub import push_student
        from distilspeed.trainer.training.loop import train
        from distilspeed.trainer.training.plan import print_plan
        from distilspeed.trainer.training.run import prepare_run

    quiet_libraries()
    run = prepare_run(arguments, terms, parser.given)
    if run.arguments.plan:
        print_plan(run)
    else:
        train(run)
        if run.arguments.push_to_hub and run.process.rank == 0:
            push_student(run.arguments.output_dir / "student", run.arguments.push_to_hub)


if __name__ == "__main__":
    run_command(main)
