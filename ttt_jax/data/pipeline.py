"""Batch windows for training, with grain. The position in the data is one number: the step.

Row r of step s is window ``order[s B + r]``, where B is the batch size of all hosts together. ``order`` shuffles all
windows anew in every epoch, and epochs follow one another without dropping or repeating a window (a batch may span two
epochs). Any row of any step can be read by itself, so that starting at step s reads no earlier batch, and the number of
hosts may change.

For the same seed, batch size and number of windows, the order is that of the TTT-E2E authors' code, except for the few
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
    """Random access to some rows of the batches of all steps, in the form that grain expects."""

    def __init__(self, source: TokenSource, sequence_length: int, batch_size: int, seed: int, rows: Sequence[int]):
        windows = source.windows(sequence_length)
        if not windows:
            raise DataError(
                f"{source.name}: {len(source.tokens)} tokens do not fill a window of {sequence_length} and one more"
            )
        self._source, self._sequence_length, self._batch_size = source, sequence_length, batch_size
        self._order = _order(windows, seed)
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * len(self._rows)

    def __getitem__(self, index) -> Batch:
        step, i = divmod(int(index), len(self._rows))
        window = self._order[step * self._batch_size + self._rows[i]]
        return self._source.window(int(window), self._sequence_length)

    def __repr__(self) -> str:
        return f"windows of {self._source.name}"


class _OrderWithOneMore:
    """The windows of all epochs. grain shuffles each epoch as if it had one window more, which is skipped here."""

    def __init__(self, windows: int, seed: int):
        self._windows = windows
        self._shuffled = grain.MapDataset.range(windows + 1).shuffle(seed=seed).repeat()

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self._windows)
        window = self._shuffled[epoch * (self._windows + 1) + i]
        if window == self._windows:  # the added window; the last of the shuffled epoch, otherwise unread, replaces it
            window = self._shuffled[epoch * (self._windows + 1) + self._windows]
        return int(window)


def _order(windows: int, seed: int):
    """Return the order of the windows of all epochs, read by index.

    grain shuffles 2^k + 1 windows wrongly if k is even and at least 16: it reads one window twice in an epoch and
    another never. Such an epoch is shuffled as if it had one window more.
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
    """Yield the batches of steps ``start``, ``start + 1``, ... without end: arrays [rows, T].

    Args:
      batch_size: B, rows of the batch of all hosts together.
      rows: the rows that this process reads; None for all.
      worker_processes: number of processes that read ahead; with 0, threads of this process do. ``close()`` of the
        iterator ends either.

    Raises:
      ValueError: if a row is not in the batch.
      DataError: at the first batch whose data cannot be read.
    """
    rows = range(batch_size) if rows is None else rows
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {list(rows)}: expected some from 0 to below the batch size, {batch_size}")
    found_rows = grain.MapDataset.source(_Rows(source, sequence_length, batch_size, seed, rows))
    batches = found_rows.batch(len(rows), drop_remainder=True)[start:]
    found = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    if worker_processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads a flag, and this program does not parse absl's flags
        found = found.mp_prefetch(grain.MultiprocessingOptions(num_workers=worker_processes))
    return iter(found)


def stacked(rows: list[Batch], batch_size: int) -> Batch:
    """Return rows [T] as a batch [B, T], filled up with rows whose mask is 0."""
    rows = rows + [{key: np.zeros_like(x) for key, x in rows[0].items()}] * (batch_size - len(rows))
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class Feed:
    """The batches of a run, read one step ahead.

    A batch that cannot be read is known one step before it is needed, in time for all processes to stop at the same
    step.

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
        """Return the next batch, and fetch the one after it."""
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
