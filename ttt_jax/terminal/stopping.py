"""Define how commands stop: the meaning of exit statuses, and reactions to Ctrl-C and SIGTERM."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

DONE = 0
FAILED = 1  # the run cannot continue as it is: starting it again would fail again
REFUSED = 2  # the command or the config is wrong
RESTART = 75  # nothing is wrong with the run (EX_TEMPFAIL): the same command continues it
INTERRUPTED = 130  # by Ctrl-C


_GRACE = 1.0  # seconds in which a command may end by itself after a second Ctrl-C


class StopSignals:
    """A context manager that remembers the first SIGINT or SIGTERM; a second one acts as usual.

    Attributes:
      received: the signal; None as long as there was none.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number, frame) -> None:
        self.received = signal.Signals(number)
        self._restore()
        if self._before[signal.SIGINT] == signal.SIG_IGN:  # a script has started this command in the background
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()


class SecondCtrlC:
    """A context manager that ends the process with status 130 soon after a second Ctrl-C, whatever hangs in it.

    Python runs signal handlers in its main thread, which may wait for storage or for a compiler that never returns to
    Python, so a separate thread counts signals. After the first signal it counts until the process has ended, since an
    ordinary exit waits for threads that may hang too.

    Args:
      last_words: a function that returns the line to print before the process ends.
    """

    def __init__(self, last_words: Callable[[], str]):
        self._last_words, self._counted = last_words, 0
        self._thread = threading.Thread(target=self._count, name="second-ctrl-c", daemon=True)

    def __enter__(self) -> "SecondCtrlC":
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._is_main and not self._counted:
            signal.set_wakeup_fd(self._before)
            os.close(self._write)
            self._thread.join()
            os.close(self._read)

    def _count(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            self._counted += 1
            if self._counted > 1 and number[0] == signal.SIGINT:
                break
        else:
            return
        words = threading.Thread(target=self._say, daemon=True)  # it may ask storage, which may hang
        time.sleep(_GRACE)
        words.start()
        words.join(_GRACE)
        os._exit(INTERRUPTED)

    def _say(self) -> None:
        print(f"\n{self._last_words()}", file=sys.stderr, flush=True)


def _forget_in_child() -> None:
    """Keep a forked process, which also gets Ctrl-C, from writing signals to its parent's pipe."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
