"""Prepare a corpus: text files or datasets, tokenised and packed into rows for launch/train.py.

    python launch/prepare_data.py --text book.txt news.jsonl --tokenizer google-bert/bert-base-uncased \\
        --seq_length 512 --output_dir corpora/mine
    python launch/prepare_data.py --dataset wikimedia/wikipedia:20231101.en --dataset bookcorpus/bookcorpus \\
        --tokenizer google-bert/bert-base-uncased --output_dir corpora/wikipedia_bookcorpus
"""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from distilspeed.trainer.errors import CommandParser, quiet_libraries, run_command


def main() -> None:
    arguments = _parse_arguments()
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _exit_and_clean_up)
    # Imported here because every tokenising process imports this file again, and has no use for torch.
    from distilspeed.trainer.corpus import Corpus
    from distilspeed.trainer.preparation import CorpusArguments, prepare_corpus

    quiet_libraries()
    corpus: Corpus = prepare_corpus(CorpusArguments(**arguments))
    counts, padding = corpus.manifest.counts, corpus.manifest.padding_fraction
    print(
        f"{corpus.path}: {counts.documents:,} documents in {counts.pieces:,} pieces; dropped "
        f"{counts.dropped_short:,} short and {counts.dropped_unknown:,} mostly unknown ones\n"
        f"train     {counts.train_rows:>12,} rows {counts.train_tokens:>16,} tokens\n"
        f"held out  {counts.held_out_rows:>12,} rows {counts.held_out_tokens:>16,} tokens\n"
        f"padding   {padding:>12.2%} of {corpus.manifest.seq_length} tokens a row"
    )


def _parse_arguments() -> dict[str, object]:
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
        help="text (a document a line), .json, .jsonl or .parquet files",
    )
    add(
        "--dataset",
        nargs="+",
        action="extend",
        metavar="NAME[:CONFIG[:SPLIT]]",
        help="hub dataset or local dataset folder; the split is train if not given; repeat to mix",
    )
    add("--tokenizer", required=True, metavar="ID_OR_DIR", help="the teacher's: a hub name or a folder")
    add("--seq_length", type=int, help="tokens a row (default 512)")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="made by this command")
    add("--num_proc", type=int, metavar="N", help="tokenising processes (default: available cores)")
    add("--text_column", help="the field that holds the text (default text)")
    add("--held_out_fraction", type=float, help="share of the rows kept for evaluation (default 0.01)")
    add("--debug", action="store_true", help="show the traceback of an error")
    arguments = vars(parser.parse_args())
    arguments.pop("debug", None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}


def _exit_and_clean_up(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    run_command(main)
