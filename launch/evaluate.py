"""Compare a student with its teacher, and with a baseline: quality, size, latency, tasks.

    python launch/evaluate.py --teacher google-bert/bert-base-uncased --student runs/mine/student \\
        --data_dir corpora/mine --task tasks/rte --output_dir runs/mine/evaluation

Writes report.json, report.md and report.png, and prints the table.
"""

import argparse
from pathlib import Path
from typing import Any

from distilspeed.trainer.job.command import CommandParser, quiet_libraries, run_command, show_log


def main() -> None:
    options = _parse_arguments()
    # After the parsing, because importing torch and transformers takes seconds.
    from distilspeed.trainer.evaluation.comparison import EvaluateArguments, evaluate

    arguments = EvaluateArguments(**options)
    quiet_libraries()
    show_log(facts_on_stderr=True)
    print(evaluate(arguments).table())


def _parse_arguments() -> dict[str, Any]:
    """The options given, by their names in ``EvaluateArguments``; those left out keep its defaults."""
    parser = CommandParser(
        prog="launch/evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--teacher", required=True, metavar="ID_OR_DIR", help="masked language model with safetensors weights"
    )
    add("--student", required=True, metavar="ID_OR_DIR", help="the same, distilled from the teacher")
    add("--baseline", metavar="ID_OR_DIR", help="the same student trained without a teacher")
    add("--data_dir", required=True, type=Path, metavar="DIR", help="corpus made by launch/prepare_data.py")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="made by this command")
    add(
        "--task",
        action="append",
        type=Path,
        metavar="DIR",
        help="folder with train.jsonl and dev.jsonl: label, and text or text_a and text_b; repeat for more",
    )
    add("--max_rows", type=int, metavar="N", help="held-out rows to measure on (default 1000)")
    add("--task_epochs", type=int, metavar="N", help="passes over a task's training examples (default 3)")
    add("--task_seeds", type=int, metavar="N", help="fine-tuning runs per model and task (default 3)")
    add("--task_learning_rate", type=float, help="peak learning rate (default 5e-5)")
    add("--task_batch_size", type=int, metavar="N", help="examples per step (default 32)")
    add("--device", choices=("auto", "cpu", "cuda"), help="default auto: the GPU where there is one")
    add("--seed", type=int, help="of the masks; the first of the tasks' (default 0)")
    add("--debug", action="store_true", help="show the traceback of an error")
    options = vars(parser.parse_args())
    options.pop("debug", None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


if __name__ == "__main__":
    run_command(main)
