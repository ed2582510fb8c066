"""End a process that waits in vain: for another process that never comes, or in a collective that never ends."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from ttt_jax.terminal.stopping import RESTART


class Watchdog:
    """A thread that ends the process with status 75 when :meth:`heard` has not been called for too long.

    The main thread could not do it while it waits in a collective.

    Args:
      limit: seconds; 0 for no limit.
      complaint: makes the message to print from the seconds that have passed.
      armed: whether the time runs from the start; else from the first :meth:`heard`.
    """

    def __init__(self, limit: float, complaint: Callable[[float], str], *, armed: bool = True):
        self._limit, self._complaint = limit, complaint
        self._last: float | None = time.monotonic() if armed else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if limit > 0:
            self._thread.start()

    def heard(self, took: float = 0.0) -> None:
        """Start the time anew. After something that took long, allow five times as long."""
        self._limit = max(self._limit, 5 * took) if self._limit > 0 else 0
        self._last = time.monotonic()

    def rest(self) -> None:
        """Stop the time until the next :meth:`heard`."""
        self._last = None

    def close(self) -> None:
        """End the thread."""
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
