"""Pack token ids into rows: cut documents into pieces, then pack whole pieces into rows.

A *piece* is a whole document, or a part of a document that is longer than a row. A *row* has whole pieces, at most
``seq_length`` tokens in all.

In a masked corpus each piece is ``[CLS] … [SEP]``. In a causal corpus ``<|endoftext|>`` begins and ends each document,
which is then cut into pieces. GPT-2 was trained on documents with ``<|endoftext|>`` between them, so it has seen that
token before a document's first token and after its last one, but not where a row ends inside a document.

Workers import this module, so it imports no torch, transformers or datasets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np

from distilspeed.trainer.corpus.tokenization import TokenizedDocuments
from distilspeed.trainer.corpus.training_objective import TrainingObjective

# DistilBERT's original code drops sequences of at most 11 tokens, and sequences with at least half unknown tokens. Both
# counts include special tokens: remove_empty_sequences and remove_unknown_sequences in lm_seqs_dataset.py.
MINIMUM_PIECE_TOKENS = 12
UNKNOWN_SHARE_LIMIT = 0.5


@dataclass(frozen=True)
class RowRules:
    """The layout of a row: pieces, at most ``seq_length`` tokens, then ``pad_id``.

    ``cls_id … sep_id`` is a piece of a masked corpus, or a document of a causal one. ``dtype``: type of the stored ids.
    ``special_ids`` are never masked; text never becomes one, except ``unk_id``.
    """

    seq_length: int
    pad_id: int
    cls_id: int
    sep_id: int
    unk_id: int
    special_ids: tuple[int, ...]
    dtype: str
    objective: TrainingObjective = "masked"

    @property
    def tokens_around_piece(self) -> int:
        """The number of tokens of a piece that are not in its document: ``cls_id`` and ``sep_id``, or none."""
        return 2 if self.objective == "masked" else 0


@dataclass(frozen=True)
class Pieces:
    """The pieces of a batch of documents, and how many were dropped.

    ``starts``: [pieces] int64, index of each piece's first token in ``tokens``. ``lengths``: [pieces] int64, including
    the tokens around a piece, which are not in ``tokens``.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    dropped_short: int
    dropped_unknown: int


@dataclass(frozen=True)
class PackedRows:
    """Rows as arrays.

    ``input_ids``: [rows, seq_length], padded at the end. ``piece_lengths``: [pieces] int32, row by row.
    ``pieces_per_row``, ``real_tokens``, ``maskable_tokens``: [rows] int32. ``real_tokens`` excludes padding;
    ``maskable_tokens`` excludes special tokens, too.
    """

    input_ids: np.ndarray
    piece_lengths: np.ndarray
    pieces_per_row: np.ndarray
    real_tokens: np.ndarray
    maskable_tokens: np.ndarray

    def select(self, rows: np.ndarray) -> Self:
        """Return the rows where ``rows`` ([rows] bool) is true."""
        return type(self)(
            input_ids=self.input_ids[rows],
            piece_lengths=self.piece_lengths[np.repeat(rows, self.pieces_per_row)],
            pieces_per_row=self.pieces_per_row[rows],
            real_tokens=self.real_tokens[rows],
            maskable_tokens=self.maskable_tokens[rows],
        )


def cut_into_pieces(documents: TokenizedDocuments, rules: RowRules) -> Pieces:
    """Cut each document into pieces, and drop pieces that are too short or have too many unknown tokens.

    A special token that the text spells out as a word of the vocabulary becomes the unknown token.
    """
    text = np.where(np.isin(documents.tokens, rules.special_ids), rules.unk_id, documents.tokens)
    documents = TokenizedDocuments(text, documents.lengths)
    if rules.objective == "causal":
        documents = _begun_and_ended(documents, rules)
    tokens = documents.tokens
    room = rules.seq_length - rules.tokens_around_piece
    pieces_per_document = -(-documents.lengths // room)
    document = np.repeat(np.arange(len(documents.lengths)), pieces_per_document)
    first_piece = np.cumsum(pieces_per_document) - pieces_per_document
    # tokens of the document before each piece
    before = (np.arange(len(document)) - first_piece[document]) * room
    starts = (np.cumsum(documents.lengths) - documents.lengths)[document] + before
    inside = np.minimum(documents.lengths[document] - before, room)
    unknown_up_to = np.concatenate([[0], np.cumsum(tokens == rules.unk_id)])
    unknown = unknown_up_to[starts + inside] - unknown_up_to[starts]
    lengths = inside + rules.tokens_around_piece
    is_short = lengths < MINIMUM_PIECE_TOKENS
    is_unknown = ~is_short & (unknown >= UNKNOWN_SHARE_LIMIT * lengths)
    kept = ~(is_short | is_unknown)
    return Pieces(
        tokens=tokens,
        starts=starts[kept],
        lengths=lengths[kept],
        dropped_short=int(is_short.sum()),
        dropped_unknown=int(is_unknown.sum()),
    )


def _begun_and_ended(documents: TokenizedDocuments, rules: RowRules) -> TokenizedDocuments:
    """Put ``cls_id`` before each document and ``sep_id`` after it."""
    ends = np.cumsum(documents.lengths)
    places = np.stack([ends - documents.lengths, ends], axis=1).ravel()
    around = np.tile(np.array([rules.cls_id, rules.sep_id], dtype=documents.tokens.dtype), len(ends))
    return TokenizedDocuments(np.insert(documents.tokens, places, around), documents.lengths + 2)


def pack_best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put every piece, longest first, into the row with the least room that still fits it.

    ``lengths``: tokens of each piece, 1 to ``capacity``. Returns rows of indices into ``lengths``: each index once, at
    most ``capacity`` tokens per row. Rows are sorted by their lowest index, so they follow the order of the text.
    Raises ``ValueError`` for a piece that fits no row. Best-fit decreasing needs at most about 11/9 of the fewest
    possible rows (Johnson 1973).
    """
    rows: list[list[int]] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit r is set while some row has room for exactly r tokens. The best fit is the lowest set bit at or above the
    # length, so no search over rows is needed.
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


def lay_out_rows(pieces: Pieces, rows: Sequence[Sequence[int]], rules: RowRules) -> PackedRows:
    """Write the pieces of each row one after the other; ``rows`` has indices into ``pieces``, at least one per row."""
    order = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
    pieces_per_row = np.fromiter(map(len, rows), dtype=np.int32, count=len(rows))
    lengths = pieces.lengths[order]
    ends = np.concatenate([[0], np.cumsum(lengths)])  # of the pieces, without padding
    row_ends = ends[np.concatenate([[0], np.cumsum(pieces_per_row)])]
    padding_before = np.arange(len(rows)) * rules.seq_length - row_ends[:-1]
    places = ends[:-1] + np.repeat(padding_before, pieces_per_row)
    flat = np.full(len(rows) * rules.seq_length, rules.pad_id, dtype=rules.dtype)
    tokens = pieces.tokens.astype(rules.dtype)
    around = rules.tokens_around_piece
    if around:
        flat[places] = rules.cls_id
        flat[places + lengths - 1] = rules.sep_id
    for place, start, inside in zip(
        (places + around // 2).tolist(),
        pieces.starts[order].tolist(),
        (lengths - around).tolist(),
        strict=True,
    ):
        flat[place : place + inside] = tokens[start : start + inside]
    input_ids = flat.reshape(len(rows), rules.seq_length)
    return PackedRows(
        input_ids=input_ids,
        piece_lengths=lengths.astype(np.int32),
        pieces_per_row=pieces_per_row,
        real_tokens=np.diff(row_ends).astype(np.int32),
        maskable_tokens=(~np.isin(input_ids, np.array(rules.special_ids))).sum(axis=1, dtype=np.int32),
    )
