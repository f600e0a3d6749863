"""Train and evaluate the variants of the paper's ablation: each loss, the teacher and its weights left out in turn.

    python launch/ablation.py --teacher google-bert/bert-base-uncased --data_dir corpora/mine \\
        --deepspeed_config gpu_bf16 --max_steps 10000 --task glue --output_dir runs/ablation

Every training is a run of launch/train.py in its own folder. Called again, the command continues.
Writes ablation.json, ablation.md and ablation.png, and prints the table.
"""

from distilspeed.trainer.evaluation.ablation_arguments import AblationArguments
from distilspeed.trainer.job.command import fast_imports, quiet_libraries, run_command, show_log


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(AblationArguments, prog="launch/ablation.py", description=__doc__).parse()
    # After the parsing, because importing torch takes seconds.
    with fast_imports():
        from distilspeed.trainer.training.ablation_runs import run_ablation

    quiet_libraries()
    show_log(facts_on_stderr=True)
    print(run_ablation(arguments).table())


if __name__ == "__main__":
    run_command(main)
