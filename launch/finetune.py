"""Fine-tune a model on a task, with the outputs of a fine-tuned teacher if there is one, and export it.

    python launch/finetune.py --model runs/mine/student --task glue/mrpc --output_dir tuned/mrpc \\
        --teacher tuned/mrpc_teacher

Writes a model that plain transformers loads, its tokenizer and results.json, and prints its scores on dev.
"""

from distilspeed.trainer.evaluation.finetune_arguments import FinetuneArguments
from distilspeed.trainer.job.command import fast_imports, quiet_libraries, run_command, show_log


def main() -> None:
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(FinetuneArguments, prog="launch/finetune.py", description=__doc__).parse()
    # After the parsing, because importing torch takes seconds.
    with fast_imports():
        from distilspeed.trainer.evaluation.finetune import finetune

    quiet_libraries()
    show_log(facts_on_stderr=True)
    print(finetune(arguments).line())


if __name__ == "__main__":
    run_command(main)
