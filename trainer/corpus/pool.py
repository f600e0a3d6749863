"""The processes that turn documents into packed rows, a batch of documents at a time."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

from distilspeed.trainer.corpus.packing import (
    PackedRows,
    RowRules,
    cut_into_pieces,
    lay_out_rows,
    pack_best_fit_decreasing,
)
from distilspeed.trainer.corpus.tokenization import DocumentTokenizer, is_blank
from distilspeed.trainer.job.processes import children_deaf_to

# The documents packed together, by what their text takes in memory.
BATCH_CHARACTERS = 2_000_000
STRING_OVERHEAD = 50  # bytes of a str beside its characters, so that a batch of tiny documents is no larger
# One that is worked on, one to begin at once, one more for when the first in line takes longer than others.
BATCHES_PER_WORKER = 3
# A terminal sends these to parent and workers alike, and the parent ends its workers, by SIGTERM where they hang.
LEFT_TO_PARENT = (signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class PackedBatch:
    """The rows that a batch of documents fills, and what of it was left out; see ``CorpusCounts``."""

    rows: PackedRows
    documents: int
    dropped_null: int
    dropped_blank: int
    dropped_short: int
    dropped_unknown: int


def pack_documents(
    documents: Iterable[str | None], tokenizer_json: str, rules: RowRules, num_proc: int
) -> Generator[PackedBatch]:
    """Tokenise and pack in ``num_proc`` processes; the batches and their order do not depend on how many.

    ``documents``: None for one without a text; it and blank ones are counted and left out.
    ``tokenizer_json``: a `tokenizers` tokenizer, serialised. At most ``BATCHES_PER_WORKER`` batches a process
    are on their way at a time, so memory does not grow with the corpus. Close the iterator to stop the
    processes. ``BrokenProcessPool`` when a process dies.
    """
    # Spawn, because a fork while threads run (the tokenizer's, Arrow's, a hub download's) can deadlock.
    with children_deaf_to(LEFT_TO_PARENT):
        pool = ProcessPoolExecutor(
            num_proc,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer_json, rules),
        )
    waiting: deque[Future[PackedBatch]] = deque()
    try:
        for batch in _batches(documents):
            with children_deaf_to(LEFT_TO_PARENT):  # the pool starts its processes as work comes
                waiting.append(pool.submit(_pack_in_worker, batch))
            if len(waiting) >= BATCHES_PER_WORKER * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def pack_batch(documents: Sequence[str | None], tokenizer: DocumentTokenizer, rules: RowRules) -> PackedBatch:
    """What a worker does with one batch."""
    texts = [document for document in documents if document is not None and not is_blank(document)]
    dropped_null = documents.count(None)
    pieces = cut_into_pieces(tokenizer.tokenize(texts), rules)
    rows = pack_best_fit_decreasing(pieces.lengths.tolist(), rules.seq_length)
    return PackedBatch(
        rows=lay_out_rows(pieces, rows, rules),
        documents=len(texts),
        dropped_null=dropped_null,
        dropped_blank=len(documents) - dropped_null - len(texts),
        dropped_short=pieces.dropped_short,
        dropped_unknown=pieces.dropped_unknown,
    )


def _batches(documents: Iterable[str | None]) -> Iterator[list[str | None]]:
    batch: list[str | None] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document or "") + STRING_OVERHEAD
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# A worker process holds its tokenizer here: an executor has no other place for a worker's state.
_worker_state: tuple[DocumentTokenizer, RowRules]


def _start_worker(tokenizer_json: str, rules: RowRules) -> None:
    global _worker_state
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process: the processes are the parallelism
    _worker_state = (DocumentTokenizer(tokenizer_json), rules)


def _end_with_parent() -> None:
    # A worker waits for tasks on a pipe whose other end it holds itself, so it would outlive a killed parent.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pack_in_worker(documents: list[str | None]) -> PackedBatch:
    return pack_batch(documents, *_worker_state)
