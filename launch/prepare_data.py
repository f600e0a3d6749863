"""Prepare a corpus: tokenise text files or datasets and pack them into rows for launch/train.py.

    python launch/prepare_data.py --text book.txt news.jsonl --tokenizer google-bert/bert-base-uncased \\
        --seq_length 512 --output_dir corpora/mine
    python launch/prepare_data.py --dataset wikimedia/wikipedia:20231101.en \\
        --tokenizer google-bert/bert-base-uncased --output_dir corpora/wikipedia

A line of text, a JSON object or a row of a data set is a document. Attention stays within a document, so use whole
articles or books, not sentences. Pieces of fewer than 12 tokens are dropped.

To continue a build that was stopped or killed, run the same command with --resume. On a cluster, each task of a Slurm
array (sbatch --array=0-15) prepares a shard, and a job after it merges the shards:

    python launch/prepare_data.py --dataset wikimedia/wikipedia:20231101.en --resume \\
        --tokenizer google-bert/bert-base-uncased --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT \\
        --output_dir corpora/wikipedia_shards/$SLURM_ARRAY_TASK_ID
    python launch/prepare_data.py --merge corpora/wikipedia_shards/* --output_dir corpora/wikipedia
"""

import logging
import signal
import sys
from types import FrameType

from distilspeed.trainer.job.command import quiet_libraries, run_command
from distilspeed.trainer.job.processes import stop_signals

# A share of all pieces. Articles and books, a paragraph a line, have fewer.
MANY_SHORT_PIECES = 0.2


def main() -> None:
    # Imported here because every tokenising process imports this file again and needs neither transformers nor torch.
    from distilspeed.trainer.corpus.arguments import CorpusArguments
    from distilspeed.trainer.job.parser import CommandParser

    (arguments,) = CommandParser(CorpusArguments, prog="launch/prepare_data.py", description=__doc__).parse()
    for stop in stop_signals():
        signal.signal(stop, _exit_and_clean_up)
    from distilspeed.trainer.corpus.build import prepare_corpus
    from distilspeed.trainer.corpus.merge import merge_shards

    quiet_libraries()
    shards = arguments.merge
    corpus = merge_shards(shards, arguments.output_dir) if shards else prepare_corpus(arguments)
    counts, padding = corpus.manifest.counts, corpus.manifest.padding_fraction
    print(
        f"{corpus.path}: {counts.documents:,} documents in {counts.pieces:,} pieces; dropped "
        f"{counts.dropped_null:,} null and {counts.dropped_blank:,} blank documents, "
        f"{counts.dropped_short:,} short and {counts.dropped_unknown:,} mostly unknown pieces\n"
        f"train     {counts.train_rows:>12,} rows {counts.train_tokens:>16,} tokens\n"
        f"held out  {counts.held_out_rows:>12,} rows {counts.held_out_tokens:>16,} tokens\n"
        f"padding   {padding:>12.2%} of {corpus.manifest.seq_length} tokens per row"
    )
    short = counts.dropped_short / max(1, counts.dropped_short + counts.pieces)
    if short > MANY_SHORT_PIECES:
        logging.getLogger("distilspeed").warning(
            f"{short:.0%} of the pieces were too short and dropped; if each document is a sentence, join the "
            "sentences of a text, or use --document_separator blank_line"
        )


def _exit_and_clean_up(signal_number: int, frame: FrameType | None) -> None:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    run_command(main)
