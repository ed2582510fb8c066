"""What an evaluation reads: sequences of tokens, each from a fresh state, piece by piece, however long they are.

Three ways to cut a split into sequences: windows, whatever documents lie in them; whole documents; and chains of
documents, read one after another without a fresh state in between.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax.data.pipeline import Batch, stacked
from ttt_jax.data.token_source import Tokens, TokenSource
from ttt_jax.errors import ConfigError

_SCANNED = 1 << 22  # tokens looked at at a time
LEAST_TOKENS = 2  # of a document; there is nothing to predict in a shorter one


class Span(NamedTuple):
    """Tokens that follow one another in a split.

    Attributes:
      start, stop: the inputs are tokens ``[start, stop)``, each with the token behind it for its target.
      counted: only so many of the targets, from the first, may count.
    """

    start: int
    stop: int
    counted: int

    def __len__(self) -> int:
        return self.stop - self.start


Sequences = Sequence[tuple[Span, ...]]  # spans of one sequence are read as if they followed one another


class Piece(NamedTuple):
    """The next tokens of B sequences.

    Attributes:
      begins: whether they are the first of their sequences, so that what was read before is to be forgotten.
      ends: whether they are the last.
      batch: arrays [B, T]; masked where a sequence has ended, and where there is none.
      rows: how many of the rows are sequences.
    """

    begins: bool
    ends: bool
    batch: Batch
    rows: int


def windows(source: TokenSource, length: int, most: int) -> list[tuple[Span, ...]]:
    """At most so many windows of ``length`` tokens, spread evenly over the split, in order."""
    total = source.windows(length)
    count = min(total, most)
    starts = [i * total // count * length for i in range(count)]
    return [(Span(start, start + length, length),) for start in starts]


def documents(source: TokenSource, length: int, most: int) -> list[tuple[Span, ...]]:
    """At most so many documents, spread evenly over the split, in order: each to its end, or ``length`` tokens of it.

    The first token of a document is input only; its last is target only.
    """
    return [(Span(span.start, span.start + span.counted, span.counted),) for span in _whole(source, length, most)]


def chains(source: TokenSource, length: int, most: int, chains: int) -> list[tuple[Span, ...]]:
    """The same documents, in so many chains of neighbours, which are as many documents each, give or take one.

    What counts is what counts in :func:`documents`. The last token of a document is read here, too.
    """
    found = _whole(source, length, most)
    chains = min(chains, len(found))
    cuts = [i * len(found) // chains for i in range(chains + 1)]
    return [tuple(found[first:last]) for first, last in itertools.pairwise(cuts)]


def starts(source: TokenSource) -> np.ndarray:
    """Where documents begin, [documents], in order.

    Raises:
      ConfigError: where the source does not know its documents, nor a token that begins them.
    """
    found = _found_starts(source) if source.documents is None else _known_starts(source.documents)
    return np.concatenate([np.zeros(0, np.int64), *found])


def length(sequence: tuple[Span, ...]) -> int:
    """Inputs of a sequence."""
    return sum(map(len, sequence))


def counted(source: TokenSource, sequence: tuple[Span, ...]) -> np.ndarray:
    """Return which targets of a sequence count, [its tokens], boolean."""
    none = np.zeros(0, bool)
    return np.concatenate([none, *(_mask(source.piece(span.start, span.stop), span, 0) > 0 for span in sequence)])


def too_short(source: TokenSource) -> int:
    """Return how many documents have nothing to predict, as they are shorter than :data:`LEAST_TOKENS`."""
    return int((np.diff(starts(source), append=len(source.tokens)) < LEAST_TOKENS).sum())


def pieces(source: TokenSource, sequences: Sequences, *, piece_length: int, batch_size: int) -> Iterator[Piece]:
    """Sequences, B at a time, each from its first token to its last.

    All pieces of one group of sequences follow one another before the next group begins.

    Args:
      piece_length: T, tokens of a sequence in a batch.
      batch_size: B, sequences side by side.
    """
    for first in range(0, len(sequences), batch_size):
        group = sequences[first : first + batch_size]
        longest = max(map(length, group))
        for offset in range(0, longest, piece_length):
            rows = [_row(source, sequence, offset, piece_length) for sequence in group]
            yield Piece(offset == 0, offset + piece_length >= longest, stacked(rows, batch_size), len(group))


def _row(source: TokenSource, sequence: tuple[Span, ...], offset: int, tokens: int) -> Batch:
    """Inputs ``[offset, offset + tokens)`` of a sequence, filled up where it ends before."""
    parts, place = [], 0  # of the span in the sequence
    for span in sequence:
        first, last = max(offset, place) - place, min(offset + tokens, place + len(span)) - place
        if first < last:
            part = source.piece(span.start + first, span.start + last)
            part["mask"] = _mask(part, span, first)
            parts.append(part)
        place += len(span)
    if not parts:
        parts.append(source.piece(0, 0))
    row = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {key: np.pad(x, (0, tokens - len(x))) for key, x in row.items()}


def _mask(part: Batch, span: Span, first: int) -> np.ndarray:
    """Return the mask of a part of a span that begins ``first`` tokens behind the start of the span."""
    return part["mask"] * (first + np.arange(len(part["mask"])) < span.counted)


def _whole(source: TokenSource, length: int, most: int) -> list[Span]:
    """Documents with all of their tokens as inputs, or the first so many."""
    pairs = itertools.pairwise([*starts(source).tolist(), len(source.tokens)])
    found = [(start, stop) for start, stop in pairs if stop - start >= LEAST_TOKENS]
    count = min(len(found), most)
    spread = [found[i * len(found) // count] for i in range(count)]
    end = len(source.tokens) - 1  # the last token of all has no target
    return [Span(start, min(stop, start + length, end), min(stop - 1 - start, length)) for start, stop in spread]


def _known_starts(documents: Tokens) -> Iterator[np.ndarray]:
    for first in range(0, len(documents), _SCANNED):
        yield np.asarray(documents[first : first + _SCANNED]).astype(np.int64)


def _found_starts(source: TokenSource) -> Iterator[np.ndarray]:
    if source.bos is None:
        raise ConfigError(
            f"{source.name}: does not say where documents begin; expected a run with data.bos, or windows"
        )
    for first in range(0, len(source.tokens), _SCANNED):
        yield first + np.flatnonzero(source.tokens[first : first + _SCANNED] == source.bos)
