"""Worker processes that turn batches of documents into packed rows."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from distilspeed.trainer.corpus.packing import (
    PackedRows,
    RowRules,
    cut_into_pieces,
    lay_out_rows,
    pack_best_fit_decreasing,
)
from distilspeed.trainer.corpus.tokenization import DocumentTokenizer, is_blank
from distilspeed.trainer.job.workers import WorkerPool

# The size of a batch of documents, by the memory that the text takes.
BATCH_CHARACTERS = 2_000_000
STRING_OVERHEAD = 50  # bytes of a str besides its characters; bounds batches of tiny documents
# One batch in work, one ready to start, and one more in case the oldest batch is slow.
BATCHES_PER_WORKER = 3


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
    waiting: deque[Future[PackedBatch]] = deque()
    with WorkerPool([partial(_start_worker, tokenizer_json, rules)] * num_proc) as pool:
        for batch in _batches(documents):
            waiting.append(pool.submit(_pack_in_worker, batch))
            if len(waiting) >= BATCHES_PER_WORKER * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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


# A worker process keeps its tokenizer here.
_worker_state: tuple[DocumentTokenizer, RowRules]


def _start_worker(tokenizer_json: str, rules: RowRules) -> None:
    global _worker_state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    _worker_state = (DocumentTokenizer(tokenizer_json), rules)


def _pack_in_worker(documents: list[str | None]) -> PackedBatch:
    return pack_batch(documents, *_worker_state)
