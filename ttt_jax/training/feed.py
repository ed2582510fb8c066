"""The batches of a process, one ahead."""

import time
from collections.abc import Iterator
from typing import Any

from ttt_jax.errors import DataError


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
