"""Whole documents in order, for evaluation: a document is read piece by piece, however long it is."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ttt_jax.config import ConfigError
from ttt_jax.data.pipeline import Batch, stacked
from ttt_jax.data.source import Tokens, TokenSource

_SCANNED = 1 << 22  # tokens looked at at a time


class Piece(NamedTuple):
    """The next tokens of B documents.

    Attributes:
      begins: whether they are the first of their documents, so that what was read before is to be forgotten.
      batch: arrays [B, T]; masked where a document has ended, and where there is none.
      rows: how many of the rows are documents.
    """

    begins: bool
    batch: Batch
    rows: int


def bounds(source: TokenSource, least_tokens: int = 2) -> Iterator[tuple[int, int]]:
    """Where the documents of at least so many tokens begin and end, in order.

    Raises:
      ConfigError: where the source does not know its documents, nor a token that begins them.
    """
    starts = _found_starts(source) if source.documents is None else _known_starts(source.documents)
    for start, stop in itertools.pairwise(itertools.chain(starts, [len(source.tokens)])):
        if stop - start >= least_tokens:
            yield start, stop


def pieces(
    source: TokenSource,
    *,
    piece_length: int,
    batch_size: int,
    most_documents: int | None = None,
    most_tokens: int | None = None,
    least_tokens: int = 2,
) -> Iterator[Piece]:
    """Documents, B at a time, each from its first token to its last.

    All pieces of one group of documents follow one another before the next group begins. The first token of a document
    is input only; its last is target only.

    Args:
      piece_length: T, tokens of a document in a batch.
      batch_size: B, documents side by side.
      most_documents: of the split, evenly spread; None for all.
      most_tokens: read no more of each document than so many inputs; None for all.
      least_tokens: shorter documents are left out.
    """
    found = list(bounds(source, least_tokens))
    count = min(len(found), most_documents or len(found))
    found = [found[i * len(found) // count] for i in range(count)]
    for first in range(0, count, batch_size):
        group = [
            (start, min(stop - 1, start + (most_tokens or stop))) for start, stop in found[first : first + batch_size]
        ]
        longest = max(stop - start for start, stop in group)
        for offset in range(0, longest, piece_length):
            rows = [
                _row(source, start + offset, min(stop, start + offset + piece_length), piece_length)
                for start, stop in group
            ]
            yield Piece(offset == 0, stacked(rows, batch_size), len(group))


def _row(source: TokenSource, start: int, stop: int, length: int) -> Batch:
    """Inputs ``[start, stop)``, filled up to a length."""
    row = source.piece(start, max(start, stop))
    return {key: np.pad(x, (0, length - len(x))) for key, x in row.items()}


def _known_starts(documents: Tokens) -> Iterator[int]:
    for first in range(0, len(documents), _SCANNED):
        yield from documents[first : first + _SCANNED].tolist()


def _found_starts(source: TokenSource) -> Iterator[int]:
    if source.bos is None:
        raise ConfigError(f"{source.name}: does not say where documents begin; expected data.bos to be set")
    for first in range(0, len(source.tokens), _SCANNED):
        yield from (first + np.flatnonzero(source.tokens[first : first + _SCANNED] == source.bos)).tolist()
