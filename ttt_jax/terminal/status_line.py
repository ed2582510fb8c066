"""A live line on a terminal; a line now and then elsewhere."""

import sys
import time

from rich.progress import BarColumn, Progress, TextColumn

from ttt_jax.terminal import console

_SECONDS_BETWEEN_LINES = 10.0


class StatusLine:
    """What a long command is at, on standard error.

    Args:
      total: of whatever is counted; ``start``: what of it is done already.
      text: what stands there until the first :meth:`show`.
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
        """Shows where the command is; the line that says that all is done is always printed."""
        if self._bar:
            self._bar.update(self._task, completed=done, text=text)
        elif done == self._total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show what the command is at, without counting: on a terminal in the live line, else as a line of its own."""
        if self._bar:
            self._bar.update(self._task, text=text)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()
