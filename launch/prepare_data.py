"""Prepare a corpus: text files or datasets, tokenised and packed into rows for launch/train.py.

    python launch/prepare_data.py --text book.txt news.jsonl --tokenizer google-bert/bert-base-uncased \\
        --seq_length 512 --output_dir corpora/mine
    python launch/prepare_data.py --dataset wikimedia/wikipedia:20231101.en --dataset bookcorpus/bookcorpus \\
        --tokenizer google-bert/bert-base-uncased --output_dir corpora/wikipedia_bookcorpus

A build that is stopped or killed goes on with the same command and --resume. On a cluster, each task of a Slurm
array (sbatch --array=0-15) prepares a shard, and a job after it merges them:

    python launch/prepare_data.py --dataset wikimedia/wikipedia:20231101.en --resume \\
        --tokenizer google-bert/bert-base-uncased --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT \\
        --output_dir corpora/wikipedia_shards/$SLURM_ARRAY_TASK_ID
    python launch/prepare_data.py --merge corpora/wikipedia_shards/* --output_dir corpora/wikipedia
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from distilspeed.trainer.errors import UserError
from distilspeed.trainer.job.command import CommandParser, quiet_libraries, run_command
from distilspeed.trainer.job.processes import stop_signals


def main() -> None:
    arguments = _parse_arguments()
    for stop in stop_signals():
        signal.signal(stop, _exit_and_clean_up)
    # Imported here because every tokenising process imports this file again, and has no use for torch.
    from distilspeed.trainer.corpus.build import CorpusArguments, prepare_corpus
    from distilspeed.trainer.corpus.format import Shard
    from distilspeed.trainer.corpus.merge import merge_shards

    quiet_libraries()
    if "merge" in arguments:
        corpus = merge_shards(arguments["merge"], arguments["output_dir"])
    else:
        if "shard" in arguments:
            arguments["shard"] = Shard(*arguments["shard"])
        corpus = prepare_corpus(CorpusArguments(**arguments))
    counts, padding = corpus.manifest.counts, corpus.manifest.padding_fraction
    print(
        f"{corpus.path}: {counts.documents:,} documents in {counts.pieces:,} pieces; dropped "
        f"{counts.dropped_null:,} null and {counts.dropped_blank:,} blank documents, "
        f"{counts.dropped_short:,} short and {counts.dropped_unknown:,} mostly unknown pieces\n"
        f"train     {counts.train_rows:>12,} rows {counts.train_tokens:>16,} tokens\n"
        f"held out  {counts.held_out_rows:>12,} rows {counts.held_out_tokens:>16,} tokens\n"
        f"padding   {padding:>12.2%} of {corpus.manifest.seq_length} tokens a row"
    )


def _index_and_count(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(
            "bad-argument", f"--shard {text!r} is not I/N; give for example 0/16, the first of 16"
        )
    return int(parts[0]), int(parts[1])


def _parse_arguments() -> dict[str, Any]:
    """The options given, by their names in ``CorpusArguments``; those left out keep its defaults."""
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        action="extend",
        type=Path,
        metavar="FILE",
        help="text, JSON lines, a JSON array or Parquet, recognised by content; or compressed (gzip, bzip2, xz, zstd)",
    )
    add(
        "--dataset",
        nargs="+",
        action="extend",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="hub dataset or local dataset folder; the split is train if not given; repeat to mix",
    )
    add("--tokenizer", metavar="ID_OR_DIR", help="the teacher's: a hub name or a folder")
    add("--seq_length", type=int, help="tokens a row (default 512)")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="made by this command")
    add("--num_proc", type=int, metavar="N", help="tokenising processes (default: available cores)")
    add("--text_column", help="the field that holds the text (default text)")
    add(
        "--document_separator",
        choices=("line", "blank_line"),
        help="a document of plain text is a line (default), or the lines between blank ones",
    )
    add("--held_out_fraction", type=float, help="share of the rows kept for evaluation (default 0.01)")
    add(
        "--shard",
        type=_index_and_count,
        metavar="I/N",
        help="prepare part I, counted from 0, of N equal parts of every source",
    )
    add(
        "--resume", action="store_true", help="go on with a build that was stopped or killed, if there is one"
    )
    add("--merge", nargs="+", type=Path, metavar="DIR", help="join all the shards of a corpus")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = vars(parser.parse_args())
    arguments.pop("debug", None)
    if "merge" in arguments:
        if others := arguments.keys() - {"merge", "output_dir"}:
            raise UserError(
                "conflicting-arguments",
                f"--merge takes --output_dir and nothing else; leave out --{min(others)}",
            )
    elif "tokenizer" not in arguments:
        raise UserError(
            "missing-argument", "--tokenizer is missing; give the teacher's, a hub name or a folder"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def _exit_and_clean_up(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    run_command(main)
