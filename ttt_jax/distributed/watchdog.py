"""Ends a process that waits in vain: for a peer that never came, or in a collective that never ends."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from ttt_jax.terminal.stopping import RESTART


class Watchdog:
    """Ends the process with status 75 once nothing has been heard for too long.

    It is a thread, for the main thread, deep in a collective, could not do it.

    Args:
      limit: seconds.
      complaint: what to say; is called with the seconds that have passed.
      armed: whether the time runs from the beginning, or from the first :meth:`heard`.
    """

    def __init__(self, limit: float, complaint: Callable[[float], str], *, armed: bool = True):
        self._limit, self._complaint = limit, complaint
        self._last: float | None = time.monotonic() if armed else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit > 0:
            self._thread.start()

    def heard(self, took: float = 0.0) -> None:
        """All is well; the time starts anew. What took long once may take five times as long again."""
        self._limit = max(self._limit, 5 * took) if self._limit > 0 else 0
        self._last = time.monotonic()

    def rest(self) -> None:
        """Does not watch until the next :meth:`heard`."""
        self._last = None

    def close(self) -> None:
        """Stops watching."""
        self._ended.set()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 10)):
            last = self._last
            passed = 0.0 if last is None else time.monotonic() - last
            if passed > self._limit:
                print(f"\n{self._complaint(passed)}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(RESTART)
