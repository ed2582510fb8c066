"""Show the progress of a long command: a live line on a terminal, a line from time to time elsewhere."""

import sys
import time

from rich.progress import BarColumn, Progress, TextColumn

from ttt_jax.terminal import console

_SECONDS_BETWEEN_LINES = 10.0


class StatusLine:
    """The progress of a long command, on standard error.

    Args:
      total: the number of whatever is counted.
      start: how many of them are done already.
      text: the text until the first :meth:`show`.
    """

    def __init__(self, total: int, start: int = 0, text: str = ""):
        self._total = total
        self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.fields[text]}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
            )
            self._bar = Progress(*columns, console=console.literal(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total, completed=start, text=text)
            self._bar.start()

    def show(self, done: int, text: str) -> None:
        """Show how many are done, with a text. Elsewhere than on a terminal, the last line is always printed."""
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        elif done == self._total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show a text without counting: on a terminal in the live line, elsewhere as a line of its own."""
        if self._bar:
            self._bar.update(self._task, text=text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar:
            self._bar.stop()
