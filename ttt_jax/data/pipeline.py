"""Windows to batches, with grain. The position in the data is one number: the step.

Row r of step s is window ``order[s B + r]``, where ``order`` shuffles all windows anew in every epoch, and epochs
follow one another without dropping or repeating a window (a batch may span two). Any row of any step can be had by
itself, so starting at step s reads nothing of what came before, and the number of hosts may change.

The order is that of the TTT-E2E authors' code for the same seed, batch size and number of windows, but for the few
numbers of windows for which grain's shuffle is not a permutation.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from ttt_jax.data.token_source import TokenSource
from ttt_jax.errors import DataError

Batch = dict[str, np.ndarray]


class _Rows:
    """Random access to some rows of the batches, step after step without end, as grain wants it."""

    def __init__(self, source: TokenSource, sequence_length: int, batch_size: int, seed: int, rows: Sequence[int]):
        windows = source.windows(sequence_length)
        if not windows:
            raise DataError(f"{source.name}: {len(source.tokens)} tokens are no window of {sequence_length}")
        self._source, self._sequence_length, self._batch_size = source, sequence_length, batch_size
        self._order = _order(windows, seed)
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * len(self._rows)

    def __getitem__(self, index) -> Batch:
        step, place = divmod(int(index), len(self._rows))
        window = self._order[step * self._batch_size + self._rows[place]]
        return self._source.window(int(window), self._sequence_length)

    def __repr__(self) -> str:
        return f"windows of {self._source.name}"


class _OrderWithOneMore:
    """The windows of epoch after epoch, each epoch shuffled by grain as if it had one window more, which is skipped."""

    def __init__(self, windows: int, seed: int):
        self._windows = windows
        self._shuffled = grain.MapDataset.range(windows + 1).shuffle(seed=seed).repeat()

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._windows)
        window = self._shuffled[epoch * (self._windows + 1) + place]
        if window == self._windows:  # the place that the added window would have taken has the one for it
            window = self._shuffled[epoch * (self._windows + 1) + self._windows]
        return int(window)


def _order(windows: int, seed: int):
    """Return the window of each place in the row of all epochs, by index.

    grain shuffles 2^k + 1 windows wrongly where k is even and at least 16: it reads one of them twice in an epoch and
    another never. Such an epoch is shuffled as one of a window more.
    """
    k = (windows - 1).bit_length() - 1
    if windows - 1 == 1 << max(k, 0) and k >= 16 and k % 2 == 0:
        return _OrderWithOneMore(windows, seed)
    return grain.MapDataset.range(windows).shuffle(seed=seed).repeat()


def train_batches(
    source: TokenSource,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    start: int = 0,
    rows: Sequence[int] | None = None,
    worker_processes: int = 0,
) -> grain.DatasetIterator[Batch]:
    """The batches of steps ``start``, ``start + 1``, ... without end: arrays [rows, T].

    Args:
      batch_size: B, rows of the batch of all hosts together.
      rows: which of them are wanted here; None for all.
      worker_processes: that read ahead; with none, threads of this process do. ``close()`` of the iterator ends both.

    Raises:
      ValueError: where there is no such row.
      DataError: at the batch where the data turns out to be bad.
    """
    rows = range(batch_size) if rows is None else rows
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {list(rows)}: expected some from 0 to below the batch size, {batch_size}")
    found_rows = grain.MapDataset.source(_Rows(source, sequence_length, batch_size, seed, rows))
    batches = found_rows.batch(len(rows), drop_remainder=True)[start:]
    found = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if worker_processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks for the value of a flag, and nobody here parses absl's
        found = found.mp_prefetch(grain.MultiprocessingOptions(num_workers=worker_processes))
    return iter(found)


def stacked(rows: list[Batch], batch_size: int) -> Batch:
    """Rows [T] to a batch [B, T], filled up with rows that are masked throughout."""
    rows = rows + [{key: np.zeros_like(x) for key, x in rows[0].items()}] * (batch_size - len(rows))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class Feed:
    """Holds the next batch ready, so that one that cannot be read is known a step before it is needed: in time for all
    processes to stop at the same step.

    Attributes:
      problem: why there is no next batch; None while there is one.
      waited: seconds spent waiting for data, since it was last set to 0.
    """

    def __init__(self, batches: Iterator[dict[str, Any]]):
        self._batches = batches
        self._next: dict[str, Any] | None = None
        self.problem: DataError | None = None
        self.waited = 0.0
        self._fetch()

    def take(self) -> dict[str, Any]:
        """The next batch; the one after it is fetched."""
        batch = self._next
        assert batch is not None, self.problem
        self._fetch()
        return batch

    def _fetch(self) -> None:
        start = time.monotonic()
        try:
            self._next = next(self._batches)
        except DataError as error:
            self._next, self.problem = None, error
        self.waited += time.monotonic() - start
