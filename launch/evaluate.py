"""Compare a student with its teacher and with a baseline: quality, size, latency, tasks.

    python launch/evaluate.py --teacher google-bert/bert-base-uncased --student runs/mine/student \\
        --data_dir corpora/mine --task tasks/rte --output_dir runs/mine/evaluation

Writes report.json, report.md and report.png, and prints the table. To continue an evaluation that was killed, run the
same command with --resume.
"""

from distilspeed.trainer.evaluation.arguments import EvaluateArguments
from distilspeed.trainer.job.command import fast_imports, quiet_libraries, run_command, show_log


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(EvaluateArguments, prog="launch/evaluate.py", description=__doc__).parse()
    # After the parsing, because importing torch takes seconds.
    with fast_imports():
        from distilspeed.trainer.evaluation.comparison import evaluate

    quiet_libraries()
    show_log(facts_on_stderr=True)
    print(evaluate(arguments).table())


if __name__ == "__main__":
    run_command(main)
