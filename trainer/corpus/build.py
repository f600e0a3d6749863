"""Prepare a corpus on disk from text; format.py describes the format."""

import contextlib
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from distilspeed.trainer.corpus.arguments import CorpusArguments
from distilspeed.trainer.corpus.format import (
    Corpus,
    load_tokenizer,
    open_corpus,
    tokenizer_hash,
)
from distilspeed.trainer.corpus.pool import pack_documents
from distilspeed.trainer.corpus.sources import Source, dataset_source, file_source, split_specification
from distilspeed.trainer.corpus.unfinished import Recipe, UnfinishedCorpus, unfinished_corpus
from distilspeed.trainer.corpus.vocabulary import document_pipeline
from distilspeed.trainer.corpus.writer import RowWriter, finish_corpus, installed_versions, row_rules
from distilspeed.trainer.errors import UserError
from distilspeed.trainer.files import check_unoccupied, parents_made

MINIMUM_SEQ_LENGTH = 16
MAXIMUM_SEQ_LENGTH = 1 << 16  # some tokenizers have no limit


def prepare_corpus(arguments: CorpusArguments) -> Corpus:
    """Prepare the corpus that ``arguments`` describe, and open it.

    The corpus is written to a folder beside ``output_dir`` and renamed when it is complete, so ``output_dir`` is never
    partial (unfinished.py describes what an interrupted build leaves). The same arguments give the same bytes for any
    ``num_proc``, interrupted or not. Raises ``UserError`` for anything the caller can fix.
    """
    sources, tokenizer = open_input(arguments)
    recipe = Recipe(
        sources=tuple(source.record for source in sources),
        document_separator=arguments.document_separator,
        text_column=arguments.text_column,
        tokenizer_hash=tokenizer_hash(tokenizer),
        seq_length=arguments.seq_length,
        held_out_fraction=arguments.held_out_fraction,
        shard=arguments.shard,
        versions=installed_versions(),
    )
    try:
        with (
            parents_made(arguments.output_dir),
            unfinished_corpus(arguments.output_dir, recipe, arguments.resume) as build,
        ):
            _write_corpus(build, arguments, sources, tokenizer)
    except BrokenProcessPool as error:
        raise UserError(
            "out-of-memory",
            "a tokenising process died, probably out of memory; try a smaller --num_proc",
        ) from error
    return open_corpus(arguments.output_dir)


def open_input(arguments: CorpusArguments) -> tuple[list[Source], PreTrainedTokenizerFast]:
    """Open the sources and the tokenizer; raise ``UserError`` for bad input before anything is written."""
    check_unoccupied(arguments.output_dir)
    sources = _open_sources(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer)
    _check_seq_length(arguments.seq_length, tokenizer)
    if arguments.shard.count == 1:  # a shard of a small source may be empty
        for source in sources:
            _check_holds_text(source)
    return sources, tokenizer


def _open_sources(arguments: CorpusArguments) -> list[Source]:
    column, shard = arguments.text_column, arguments.shard
    try:
        sources = [file_source(path, column, shard, arguments.document_separator) for path in arguments.text]
        sources += [dataset_source(name, column, shard) for name in arguments.dataset]
    except OSError as error:
        raise UserError(
            "unreadable-file", f"cannot read {error.filename}: {error.strerror}; check --text and --dataset"
        ) from error
    if arguments.document_separator != "line" and not any(source.is_plain_text for source in sources):
        raise UserError(
            "conflicting-arguments",
            f"--document_separator {arguments.document_separator} applies only to plain text, and --text has no such "
            "file; add one or leave out the flag",
        )
    for name in arguments.dataset:
        folder = Path(split_specification(name)[0])
        if folder.is_dir() and folder.resolve() in arguments.output_dir.resolve().parents:
            raise UserError(
                "output-inside-input",
                f"{arguments.output_dir} is inside the dataset {name}; choose another --output_dir",
            )
    return sources


def _check_seq_length(seq_length: int, tokenizer: PreTrainedTokenizerFast) -> None:
    limit = min(tokenizer.model_max_length, MAXIMUM_SEQ_LENGTH)
    if not MINIMUM_SEQ_LENGTH <= seq_length <= limit:
        raise UserError(
            "bad-argument",
            f"--seq_length {seq_length} is out of range; choose from {MINIMUM_SEQ_LENGTH} to {limit}, the limit of the "
            "tokenizer",
        )


def _check_holds_text(source: Source) -> None:
    with contextlib.closing(source.documents()) as documents:
        if next(documents, None) is None:
            raise UserError("no-text", f"{source.record.name} contains no text; leave it out or add text")


def _write_corpus(
    build: UnfinishedCorpus,
    arguments: CorpusArguments,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rules = row_rules(tokenizer, arguments.seq_length)
    writer = RowWriter(build.folder, rules, len(tokenizer), arguments.held_out_fraction, state=build.written)
    with contextlib.closing(writer):
        done = writer.counts.documents_read
        documents = chain.from_iterable(source.values() for source in sources)
        remaining = islice(documents, done, None)
        batches = pack_documents(remaining, document_pipeline(tokenizer), rules, arguments.num_proc)
        with (
            contextlib.closing(batches),
            tqdm(unit=" documents", disable=None, initial=done) as progress,
        ):
            for batch in batches:
                writer.add(batch)
                build.record_when_due(writer)
                progress.update(batch.documents + batch.dropped_null + batch.dropped_blank)
        counts = writer.counts
        if not counts.train_rows or not counts.held_out_rows:
            raise UserError(
                "not-enough-text",
                f"the text fills {counts.train_rows + counts.held_out_rows} row(s) of {arguments.seq_length} "
                "tokens, too few for train and held-out rows; give more text or a smaller --seq_length",
            )
        build.record(writer)
    records = tuple(source.record for source in sources)
    finish_corpus(
        build.folder,
        tokenizer,
        arguments.seq_length,
        records,
        arguments.document_separator,
        arguments.shard,
        counts,
        writer.token_counts,
    )
