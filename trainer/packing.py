"""Documents to rows: tokenise in worker processes, split into pieces, pack whole pieces into rows.

A *piece* is ``[CLS] … [SEP]``: a document, or a part of one that is longer than a row. A *row* holds
whole pieces, at most ``seq_length`` tokens in all. Workers import this module only, so it stays light:
no torch, no transformers, no datasets.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from distilspeed.trainer.errors import UserError

# DistilBERT's own corpus keeps sequences of more than 11 tokens of which less than half are unknown,
# special tokens counted: remove_empty_sequences and remove_unknown_sequences, lm_seqs_dataset.py.
MINIMUM_PIECE_TOKENS = 12
UNKNOWN_SHARE_LIMIT = 0.5

# What one task carries to a worker: enough to hide the pipe, little enough that a queue of them is small.
DOCUMENTS_PER_TASK = 256
CHARACTERS_PER_TASK = 200_000
TASKS_PER_WORKER = 4

# Pieces packed together. Padding of 12 MB of Gutenberg prose at 128 and 512 tokens, November 2026:
# 0.62 % and 0.26 % with 4096 pieces, 0.59 % and 0.17 % with 16384, the same with all of them at once.
PACKING_BUFFER_PIECES = 8192


@dataclass(frozen=True)
class PieceRules:
    """What a piece is: at most ``seq_length`` tokens, with ``cls_id`` in front and ``sep_id`` behind."""

    seq_length: int
    cls_id: int
    sep_id: int
    unk_id: int
    dtype: str


@dataclass(frozen=True)
class PieceBatch:
    """The pieces of some documents, end to end, and what was left out.

    ``tokens``: [sum of lengths] of the rules' dtype. ``lengths``: [pieces] int32, special tokens counted.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    documents: int
    dropped_short: int
    dropped_unknown: int

    def pieces(self) -> list[np.ndarray]:
        """One view into ``tokens`` a piece, in order."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def split_into_pieces(token_ids: Sequence[int], rules: PieceRules) -> list[list[int]]:
    """Cut one document's tokens (no special tokens yet) into pieces; none for a document without tokens."""
    room = rules.seq_length - 2
    return [
        [rules.cls_id, *token_ids[start : start + room], rules.sep_id]
        for start in range(0, len(token_ids), room)
    ]


def keep_pieces(documents: Iterable[Sequence[int]], rules: PieceRules) -> PieceBatch:
    """Split each document (its token ids) and leave out the pieces too short or too unknown to learn from."""
    kept: list[list[int]] = []
    count = dropped_short = dropped_unknown = 0
    for token_ids in documents:
        count += 1
        for piece in split_into_pieces(token_ids, rules):
            if len(piece) < MINIMUM_PIECE_TOKENS:
                dropped_short += 1
            elif piece.count(rules.unk_id) >= UNKNOWN_SHARE_LIMIT * len(piece):
                dropped_unknown += 1
            else:
                kept.append(piece)
    return PieceBatch(
        tokens=np.fromiter(itertools.chain.from_iterable(kept), dtype=rules.dtype),
        lengths=np.fromiter(map(len, kept), dtype=np.int32),
        documents=count,
        dropped_short=dropped_short,
        dropped_unknown=dropped_unknown,
    )


def pack_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every piece, longest first, into the row whose remaining room it fills best.

    ``lengths``: tokens of each piece, 1 to ``capacity``. Returns rows of indices into ``lengths``, each
    index once, no row above ``capacity`` tokens; rows are ordered by the first piece they hold, so that
    they follow the text and not the lengths. ``ValueError`` for a piece that fits no row.
    Best-fit decreasing is within 11/9 of the fewest rows (Johnson 1973).
    """
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while some row has room for exactly r tokens: the best fit is the lowest bit that is
    # at or above the length, found without a search.
    rooms = 0
    for piece in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[piece]
        if not 1 <= length <= capacity:
            raise ValueError(f"a piece of {length} tokens does not fit rows of {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return sorted(rows, key=min)


@dataclass(frozen=True)
class PackedRows:
    """Rows as arrays.

    ``input_ids``: [rows, seq_length], padding behind the pieces. ``piece_lengths``: [pieces] int32, row after
    row. ``pieces_per_row``, ``real_tokens``: [rows] int32; a row's real tokens are the sum of its pieces.
    """

    input_ids: np.ndarray
    piece_lengths: np.ndarray
    pieces_per_row: np.ndarray
    real_tokens: np.ndarray


def lay_out_rows(rows: Sequence[Sequence[np.ndarray]], seq_length: int, pad_id: int) -> PackedRows:
    """Write each row's pieces one after the other, in the pieces' dtype; at least one row."""
    input_ids = np.full((len(rows), seq_length), pad_id, dtype=rows[0][0].dtype)
    for row, pieces in zip(input_ids, rows, strict=True):
        tokens = np.concatenate(pieces)
        row[: len(tokens)] = tokens
    return PackedRows(
        input_ids=input_ids,
        piece_lengths=np.array([len(piece) for pieces in rows for piece in pieces], dtype=np.int32),
        pieces_per_row=np.array([len(pieces) for pieces in rows], dtype=np.int32),
        real_tokens=np.array([sum(map(len, pieces)) for pieces in rows], dtype=np.int32),
    )


def tokenize_documents(
    documents: Iterable[str], tokenizer_json: str, rules: PieceRules, num_proc: int
) -> Generator[PieceBatch]:
    """Tokenise in ``num_proc`` processes; the batches and their order do not depend on how many.

    ``tokenizer_json``: a `tokenizers` tokenizer, serialised. At most ``TASKS_PER_WORKER`` tasks a process
    wait at a time, so memory does not grow with the corpus. Close the iterator to stop the processes.
    ``UserError`` when a process dies.
    """
    # Spawn, because a fork while threads run (the tokenizer's, Arrow's, a hub download's) can deadlock.
    pool = ProcessPoolExecutor(
        num_proc,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_json, rules),
    )
    waiting: deque[Future[PieceBatch]] = deque()
    try:
        for task in _tasks(documents):
            waiting.append(pool.submit(_tokenize_task, task))
            if len(waiting) >= TASKS_PER_WORKER * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process died, most often for lack of memory; try again with a smaller --num_proc"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _tasks(documents: Iterable[str]) -> Iterator[list[str]]:
    task: list[str] = []
    characters = 0
    for document in documents:
        task.append(document)
        characters += len(document)
        if len(task) == DOCUMENTS_PER_TASK or characters >= CHARACTERS_PER_TASK:
            yield task
            task, characters = [], 0
    if task:
        yield task


# A worker process holds its tokenizer here: an executor has no other place for a worker's state.
_worker_state: tuple[Tokenizer, PieceRules]


def _start_worker(tokenizer_json: str, rules: PieceRules) -> None:
    global _worker_state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process: the processes are the parallelism
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells "[MASK]" or "[PAD]" talks about it: text never becomes a special token.
    tokenizer.encode_special_tokens = True
    _worker_state = (tokenizer, rules)


def _end_with_parent() -> None:
    # A worker waits for tasks on a pipe whose other end it holds itself, so it would outlive a killed parent.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_task(documents: list[str]) -> PieceBatch:
    tokenizer, rules = _worker_state
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return keep_pieces((encoding.ids for encoding in encodings), rules)
