"""Compute means over tokens, with errors that account for the dependence of tokens within a document.

A mean over tokens is a ratio of two sums over documents, m = sum_d s_d / sum_d c_d, of losses s_d and counts c_d. The
documents are the independent samples, so errors are over documents:

* the standard error is the error of the ratio to first order, sqrt(D / (D - 1) sum_d (s_d - m c_d)^2) / sum_d c_d;
* the 95 % interval lies between percentiles of the mean over documents resampled with replacement (bootstrap).

Positions are also grouped in bins, four per octave, which are the same for every context.

Shapes: T positions, D documents, K bins.
"""

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BINS_PER_OCTAVE = 4
_REPETITIONS = 1000  # of the bootstrap
_INTERVAL = (2.5, 97.5)  # percentiles


class Segment(NamedTuple):
    """Losses of consecutive tokens of one document.

    Attributes:
      document: its number.
      first: the position of the first token, from 0.
      nll: losses in nats.
      counted: whether each loss counts, boolean; None if all do. A loss that counts and is NaN or infinite makes every
        mean that contains it NaN or infinite.
    """

    document: int
    first: int
    nll: np.ndarray
    counted: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray:
        """Return whether each loss counts, boolean."""
        return np.ones(len(self.nll), bool) if self.counted is None else np.asarray(self.counted, bool)


class Estimate(NamedTuple):
    """Means [...] with their errors.

    A mean is NaN where ``tokens`` is 0, and NaN or infinite where a loss that counts is. Errors are NaN where the mean
    is not finite, and where only one document has tokens that count.
    """

    mean: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray  # of the 95 % interval
    high: np.ndarray
    tokens: np.ndarray  # the number of tokens that count


class Summary(NamedTuple):
    """Losses summarised for figures, comparisons and tables.

    Attributes:
      loss, standard_error, tokens: [T], of each position.
      document_sums, document_counts: [D, K], loss and number of tokens by document and bin.
      bins: the estimates of the bins, [K].
      all: the estimate over all tokens, scalars.
      not_finite: the number of tokens that count and have a loss that is NaN or infinite.
    """

    loss: np.ndarray
    standard_error: np.ndarray
    tokens: np.ndarray
    document_sums: np.ndarray
    document_counts: np.ndarray
    bins: Estimate
    all: Estimate
    not_finite: int = 0


def bin_edges(positions: int) -> np.ndarray:
    """Return the edges of bins, [K + 1]: bin k holds the positions ``[edges[k], edges[k + 1])``, from 1.

    Bins end at powers of two and at three places between; the last bin ends with the context.
    """
    if positions < 1:
        return np.ones(1, np.int64)  # no bin
    octaves = int(np.log2(positions)) + 1
    ends = np.unique(np.ceil(2 ** (np.arange(octaves * _BINS_PER_OCTAVE + 1) / _BINS_PER_OCTAVE)).astype(np.int64))
    return np.concatenate([[1], ends[ends < positions] + 1, [positions + 1]])


def octaves(last: np.ndarray) -> list[tuple[int, int]]:
    """Group bins by octaves of positions, which end at powers of two; return ``(first bin, last bin + 1)`` of each."""
    octave = np.ceil(np.log2(last)).astype(np.int64)
    cuts = [0, *(np.flatnonzero(np.diff(octave)) + 1).tolist(), len(last)]
    return list(itertools.pairwise(cuts))


def summarise(segments: Sequence[Segment], positions: int) -> Summary:
    """Summarise losses.

    Args:
      segments: in any order.
      positions: T, above the positions of all segments.
    """
    by_document: dict[int, list[Segment]] = {}
    for segment in segments:
        if segment.mask.any():
            by_document.setdefault(segment.document, []).append(segment)
    total, count = np.zeros(positions), np.zeros(positions, np.int64)
    edges = bin_edges(positions) - 1
    sums = np.zeros((len(by_document), len(edges) - 1))
    counts = np.zeros(sums.shape, np.int64)
    not_finite = 0
    for row, parts in enumerate(by_document.values()):
        for part in parts:
            where = slice(part.first, part.first + len(part.nll))
            counted = part.mask
            loss = np.where(counted, part.nll, 0.0).astype(np.float64)
            not_finite += int((~np.isfinite(loss)).sum())
            total[where] += loss
            count[where] += counted
            bins = np.searchsorted(edges, np.arange(where.start, where.stop), side="right") - 1
            sums[row] += np.bincount(bins, loss, len(edges) - 1)
            counts[row] += np.bincount(bins, counted, len(edges) - 1).astype(np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
    error = _error_by_position(list(by_document.values()), mean, count)
    overall = estimate(sums.sum(1), counts.sum(1))
    return Summary(mean, error, count, sums, counts, estimate(sums, counts), overall, not_finite)


def estimate(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Estimate means, [...], from sums and counts by document, [D, ...]."""
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total = counts.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(0) / total
        residuals = np.where(counts > 0, sums - mean * counts, 0.0)
        n = (counts > 0).sum(0)
        error = np.sqrt((residuals**2).sum(0) * n / (n - 1)) / total
        known = (n > 1) & np.isfinite(mean)
        error, low, high = (np.where(known, x, np.nan) for x in (error, *_bootstrap(sums, counts)))
    return Estimate(mean, error, low, high, counts.sum(0).astype(np.int64))


def _bootstrap(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of means over resampled documents; equal D, equal draws."""
    rng = np.random.default_rng(0)
    documents, shape = len(sums), sums.shape[1:]
    if not documents:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    sums, counts = sums.reshape(documents, -1), counts.reshape(documents, -1)
    means = np.empty((_REPETITIONS, sums.shape[1]))
    for i in range(_REPETITIONS):
        times = np.bincount(rng.integers(documents, size=documents), minlength=documents)
        means[i] = times @ sums / (times @ counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no tokens count
        low, high = (np.nanpercentile(means, q, axis=0).reshape(shape) for q in _INTERVAL)
    return low, high


def _error_by_position(by_document: Sequence[Sequence[Segment]], mean: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the standard errors of the means of positions, [T]."""
    squares, n = np.zeros(len(mean)), np.zeros(len(mean))
    for parts in by_document:
        first = min(part.first for part in parts)
        residual = np.zeros(max(part.first + len(part.nll) for part in parts) - first)
        counted = np.zeros(len(residual), bool)
        for part in parts:
            where = slice(part.first - first, part.first - first + len(part.nll))
            with np.errstate(invalid="ignore"):  # infinity - infinity
                residual[where] += np.where(part.mask, part.nll - mean[part.first : part.first + len(part.nll)], 0.0)
            counted[where] |= part.mask
        squares[first : first + len(residual)] += residual**2
        n[first : first + len(residual)] += counted
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n > 1, np.sqrt(squares * n / (n - 1)) / count, np.nan)
