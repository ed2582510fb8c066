"""Ctrl-C and SIGTERM as a wish to stop at the next good moment."""

import signal


class StopSignals:
    """Remembers the first SIGINT or SIGTERM within a ``with``; the second acts as usual.

    Attributes:
      received: the signal; None so far.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, frame) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()
