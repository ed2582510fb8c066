"""Cut a split into the sequences of an evaluation, and read them in pieces of bounded length.

A model reads each sequence from a fresh state. There are three ways to cut a split: windows, which ignore documents;
whole documents; and chains of documents, read one after another without a fresh state in between.

    B    batch size: sequences side by side
    T    tokens of a sequence in a piece
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ttt_jax.data.pipeline import Batch, stacked
from ttt_jax.data.token_source import Tokens, TokenSource
from ttt_jax.errors import ConfigError

_SCANNED = 1 << 22  # tokens that are searched for BOS at a time
LEAST_TOKENS = 2  # in a document; a shorter one has nothing to predict


class Span(NamedTuple):
    """Consecutive tokens of a split.

    Attributes:
      start, stop: the inputs are tokens ``[start, stop)``; the target of each is the next token.
      counted: number of targets, from the first, that may count.
    """

    start: int
    stop: int
    counted: int

    def __len__(self) -> int:
        return self.stop - self.start


Sequences = Sequence[tuple[Span, ...]]  # the spans of a sequence are read as if they followed one another


class Piece(NamedTuple):
    """The next tokens of B sequences.

    Attributes:
      begins: whether the sequences begin here, so that the state must be fresh.
      ends: whether all sequences end here.
      batch: arrays [B, T]; the mask is 0 after the end of a sequence, and in rows without one.
      rows: number of rows that are sequences.
    """

    begins: bool
    ends: bool
    batch: Batch
    rows: int


def windows(source: TokenSource, length: int, most: int) -> list[tuple[Span, ...]]:
    """Return at most ``most`` windows of ``length`` tokens, spread evenly over the split, in order."""
    total = source.windows(length)
    count = min(total, most)
    starts = [i * total // count * length for i in range(count)]
    return [(Span(start, start + length, length),) for start in starts]


def documents(source: TokenSource, length: int, most: int) -> list[tuple[Span, ...]]:
    """Return at most ``most`` documents, or their first ``length`` tokens, spread evenly over the split, in order.

    The first token of a document is only an input, its last token only a target.
    """
    return [(Span(span.start, span.start + span.counted, span.counted),) for span in _whole(source, length, most)]


def chains(source: TokenSource, length: int, most: int, chains: int) -> list[tuple[Span, ...]]:
    """Return the same documents in ``chains`` chains of consecutive documents; their numbers differ by at most one.

    The targets that count are those of :func:`documents`, but the last token of a document is an input, too.
    """
    found = _whole(source, length, most)
    chains = min(chains, len(found))
    cuts = [i * len(found) // max(chains, 1) for i in range(chains + 1)]
    return [tuple(found[first:last]) for first, last in itertools.pairwise(cuts)]


def document_starts(source: TokenSource) -> np.ndarray:
    """Return the offsets at which documents begin, [documents], in order.

    Raises:
      ConfigError: if the source knows neither its documents nor a token that begins them.
    """
    found = _found_starts(source) if source.documents is None else _known_starts(source.documents)
    return np.concatenate([np.zeros(0, np.int64), *found])


def length(sequence: tuple[Span, ...]) -> int:
    """Return the number of inputs of a sequence."""
    return sum(map(len, sequence))


def counted(source: TokenSource, sequence: tuple[Span, ...]) -> np.ndarray:
    """Return for each target of a sequence whether it counts, boolean [inputs]."""
    none = np.zeros(0, bool)
    return np.concatenate([none, *(_mask(source.piece(span.start, span.stop), span, 0) > 0 for span in sequence)])


def too_short(source: TokenSource) -> int:
    """Return the number of documents that are shorter than :data:`LEAST_TOKENS`."""
    return int((np.diff(document_starts(source), append=len(source.tokens)) < LEAST_TOKENS).sum())


def pieces(source: TokenSource, sequences: Sequences, *, piece_length: int, batch_size: int) -> Iterator[Piece]:
    """Yield sequences in pieces, B sequences at a time, each from its first token to its last.

    All pieces of one group of B sequences come before those of the next group.

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
    """Return inputs ``[offset, offset + tokens)`` of a sequence, padded if it ends before."""
    parts, begin = [], 0  # of the span in the sequence
    for span in sequence:
        first, last = max(offset, begin) - begin, min(offset + tokens, begin + len(span)) - begin
        if first < last:
            part = source.piece(span.start + first, span.start + last)
            part["mask"] = _mask(part, span, first)
            parts.append(part)
        begin += len(span)
    if not parts:
        parts.append(source.piece(0, 0))
    row = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return {key: np.pad(x, (0, tokens - len(x))) for key, x in row.items()}


def _mask(part: Batch, span: Span, first: int) -> np.ndarray:
    """Return the mask of a part of a span that begins ``first`` tokens after the start of the span."""
    return part["mask"] * (first + np.arange(len(part["mask"])) < span.counted)


def _whole(source: TokenSource, length: int, most: int) -> list[Span]:
    """Return documents, or their first ``length`` tokens, with the last token of a document as an input, too."""
    pairs = itertools.pairwise([*document_starts(source).tolist(), len(source.tokens)])
    found = [(start, stop) for start, stop in pairs if stop - start >= LEAST_TOKENS]
    count = min(len(found), most)
    spread = [found[i * len(found) // count] for i in range(count)]
    end = len(source.tokens) - 1  # the last token of the split has no target
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
