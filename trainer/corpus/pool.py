"""Worker processes that turn batches of documents into packed rows."""

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

# The size of a batch of documents, by the memory that the text takes.
BATCH_CHARACTERS = 2_000_000
STRING_OVERHEAD = 50  # bytes of a str besides its characters; bounds batches of tiny documents
# One batch in work, one ready to start, and one more in case the oldest batch is slow.
BATCHES_PER_WORKER = 3
# A terminal sends these to the parent and the workers. The parent ends its workers, with SIGTERM if they hang.
LEFT_TO_PARENT = (signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class PackedBatch:
    """The rows of a batch of documents, and what was dropped; see ``CorpusCounts``."""

    rows: PackedRows
    documents: int
    dropped_null: int
    dropped_blank: int
    dropped_short: int
    dropped_unknown: int


def pack_documents(
    documents: Iterable[str | None], tokenizer_json: str, rules: RowRules, num_proc: int
) -> Generator[PackedBatch]:
    """Tokenise and pack documents in ``num_proc`` processes; the batches and their order do not depend on ``num_proc``.

    ``documents``: None for a document without text; None and blank documents are counted and left out.
    ``tokenizer_json``: a serialised `tokenizers` tokenizer. At most ``BATCHES_PER_WORKER`` batches per process are in
    flight, so memory does not grow with the corpus. Close the iterator to stop the processes. Raises
    ``BrokenProcessPool`` if a process dies.
    """
    # Spawn, because forking while threads run (tokenizers, Arrow, a hub download) can deadlock.
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
            with children_deaf_to(LEFT_TO_PARENT):  # the pool starts its processes on demand
                waiting.append(pool.submit(_pack_in_worker, batch))
            if len(waiting) >= BATCHES_PER_WORKER * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def pack_batch(documents: Sequence[str | None], tokenizer: DocumentTokenizer, rules: RowRules) -> PackedBatch:
    """Tokenise and pack one batch of documents."""
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


# A worker process keeps its tokenizer here: an executor has no other place for per-worker state.
_worker_state: tuple[DocumentTokenizer, RowRules]


def _start_worker(tokenizer_json: str, rules: RowRules) -> None:
    global _worker_state
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    _worker_state = (DocumentTokenizer(tokenizer_json), rules)


def _end_with_parent() -> None:
    # A worker waits for tasks on a pipe whose other end it also holds, so it would outlive a killed parent.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _pack_in_worker(documents: list[str | None]) -> PackedBatch:
    return pack_batch(documents, *_worker_state)
