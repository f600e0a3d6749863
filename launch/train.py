"""Distil a teacher into its half-depth student under DeepSpeed.

deepspeed launch/train.py --deepspeed_config ds_configs/cpu.json --teacher DIR --data_dir DIR --output_dir DIR
"""

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from distilspeed.trainer.job.command import CommandParser, quiet_libraries, run_command
from distilspeed.trainer.job.environment import prepare_environment
from distilspeed.trainer.job.parents import end_with_launcher
from distilspeed.trainer.job.scheduler import take_place_from_scheduler
from distilspeed.trainer.objective.registry import TERMS, take_terms


def layer_list(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def add_setting(parser: argparse.ArgumentParser, setting: "Field[Any]") -> None:
    """Add the flag of a term's setting, with its default and its help."""
    flag, default, text = f"--{setting.name}", setting.default, setting.metadata["help"]
    if isinstance(default, bool):
        parser.add_argument(flag, action="store_true", help=text)
    else:
        shown = f"{default:g}" if isinstance(default, float) else default
        parser.add_argument(flag, type=type(default), default=default, help=f"{text}; default {shown}")


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="launch/train.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--deepspeed_config",
        type=Path,
        required=True,
        help='DeepSpeed config: a file, or one that ships, for example v100x8_fp16; "auto" values are filled in',
    )
    add(
        "--teacher",
        required=True,
        help="hub id or folder of a BERT masked language model; none: plain MLM training",
    )
    add("--data_dir", type=Path, required=True, help="corpus made by launch/prepare_data.py")
    add("--output_dir", type=Path, required=True, help="gets student/, checkpoints/, metrics.jsonl, loss.png")
    add("--student_config", help="with --teacher none: config file, folder or hub id of the model to train")
    add("--student_layers", type=layer_list, help="teacher layers to start from, for example 0,2,4,7,9,11")
    add(
        "--teacher_zero3",
        action="store_true",
        help="share the teacher's weights out over the GPUs (ZeRO-3)",
    )
    add(
        "--apex_layer_norm",
        action="store_true",
        help="NVIDIA apex's FusedLayerNorm in student and teacher (GPU)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max_steps", type=int, help="optimiser steps")
    length.add_argument("--num_train_epochs", type=float, default=3.0, help="default 3")
    add(
        "--train_batch_size",
        type=int,
        help='rows per optimiser step over all GPUs, where the config says "auto"',
    )
    add("--per_device_train_batch_size", type=int, help='rows per micro-batch, where the config says "auto"')
    add("--learning_rate", type=float, help='peak learning rate, where the config says "auto"; default 5e-4')
    for term in TERMS:
        for setting in fields(term):
            add_setting(parser, setting)
    add("--seed", type=int, default=0, help="of row order, masking and dropout; default 0")
    add("--save_steps", type=int, default=500, help="steps between checkpoints; default 500")
    add("--save_total_limit", type=int, default=2, help="checkpoints kept; default 2")
    add(
        "--save_retain_steps",
        type=int,
        metavar="N",
        help="keep the checkpoints of every N-th step besides; default none",
    )
    add("--logging_steps", type=int, default=10, help="steps between readings of the metrics; default 10")
    add(
        "--dataloader_num_workers",
        type=int,
        help="processes per rank that mask and collate; default 2 on a GPU, 0 on a CPU",
    )
    add(
        "--ddp_timeout",
        type=float,
        default=1800.0,
        help="seconds after which a rank that does not answer ends the job; default 1800",
    )
    add("--compile", action="store_true", help="compile the encoders of student and teacher (torch.compile)")
    add(
        "--full_determinism",
        action="store_true",
        help="the same bits from run to run on a GPU, too; slower",
    )
    add("--push_to_hub", metavar="REPO", help="upload the finished student to this repository of the hub")
    add(
        "--resume",
        action="store_true",
        help="continue the newest checkpoint in --output_dir, if there is one",
    )
    add(
        "--plan",
        action="store_true",
        help="print batch equation, memory estimate and FLOPs, and exit",
    )
    add(
        "--gpu_memory",
        type=float,
        metavar="GIB",
        help="with --plan: memory of the card it must fit; default that of the GPU here, if there is one",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it; LOCAL_RANK says the same
    return parser


def main() -> None:
    take_place_from_scheduler()  # before anything is said, which rank 0 alone says
    options = vars(build_parser().parse_args())
    end_with_launcher(was_launched=options["local_rank"] is not None)
    for not_an_argument in ("debug", "local_rank"):
        options.pop(not_an_argument)

    prepare_environment(options["full_determinism"])
    # After the parsing, because importing torch and DeepSpeed takes seconds.
    from distilspeed.trainer.training.arguments import TrainArguments
    from distilspeed.trainer.training.hub import push_student
    from distilspeed.trainer.training.loop import train
    from distilspeed.trainer.training.plan import print_plan
    from distilspeed.trainer.training.run import prepare_run

    quiet_libraries()
    terms = take_terms(options)
    run = prepare_run(TrainArguments(**options), terms)
    if run.arguments.plan:
        print_plan(run)
    else:
        train(run)
        if run.arguments.push_to_hub and run.process.rank == 0:
            push_student(run.arguments.output_dir / "student", run.arguments.push_to_hub)


if __name__ == "__main__":
    run_command(main)
