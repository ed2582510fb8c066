"""Windows to batches, with grain. The position in the data is one number: the step.

Batch s is a function of (source, seed, batch size, s): windows are shuffled anew in every epoch, and epochs follow one
another without dropping or repeating a window (a batch may span two epochs). Starting at step s reads nothing of what
came before.
"""

from collections.abc import Iterator

import grain
import numpy as np

from ttt_jax.data.source import TokenSource

Batch = dict[str, np.ndarray]


class _Windows:
    """Random access to the windows of a source, as grain wants it."""

    def __init__(self, source: TokenSource, sequence_length: int):
        self._source, self._sequence_length = source, sequence_length

    def __len__(self) -> int:
        return self._source.windows(self._sequence_length)

    def __getitem__(self, index) -> Batch:
        return self._source.window(int(index), self._sequence_length)

    def __repr__(self) -> str:
        return f"windows of {self._source.name}"


def train_batches(
    source: TokenSource, *, sequence_length: int, batch_size: int, seed: int, start: int = 0
) -> Iterator[Batch]:
    """The batches of steps ``start``, ``start + 1``, ... without end: arrays [B, T]."""
    windows = grain.MapDataset.source(_Windows(source, sequence_length)).seed(seed)
    batches = windows.shuffle().repeat().batch(batch_size, drop_remainder=True)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(batches[start:].to_iter_dataset(options))


def evaluation_batches(
    source: TokenSource, *, sequence_length: int, batch_size: int, most_windows: int
) -> Iterator[Batch]:
    """At most ``most_windows`` windows, spread evenly over the split, in order: arrays [B, T].

    The last batch is filled up with rows that are masked throughout.
    """
    total = source.windows(sequence_length)
    count = min(total, most_windows)
    indices = [i * total // count for i in range(count)]
    for start in range(0, count, batch_size):
        rows = [source.window(i, sequence_length) for i in indices[start : start + batch_size]]
        rows += [{key: np.zeros_like(x) for key, x in rows[0].items()}] * (batch_size - len(rows))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}
