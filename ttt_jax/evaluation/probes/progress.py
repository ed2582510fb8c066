"""How far a probe is, and how long the rest will take."""

import sys
import time

from ttt_jax.terminal.console import duration
from ttt_jax.terminal.status_line import StatusLine


class Progress:
    """A line on standard error, in tokens of prompts.

    Args:
      name: of the run.
      total: tokens of all prompts that there are to read.
    """

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done, self._text = name, total, 0, ""
        self._began = time.monotonic()
        self._line = StatusLine(total, text=name)

    def show(self, text: str) -> None:
        """Show what is being done."""
        self._text = text
        self._line.show(self._done, f"{self._name}: {text}{self._left()}")

    def add(self, tokens: int) -> None:
        """Count prompts that have been read; after the first ones, print how long all of them will take."""
        first, self._done = not self._done, self._done + tokens
        if first and self._done < self._total:
            print(f"{self._name}: {self._total:,} tokens of prompts to read{self._left()}", file=sys.stderr, flush=True)
        self._line.show(self._done, f"{self._name}: {self._text}{self._left()}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._line.close()

    def _left(self) -> str:
        if not 0 < self._done < self._total:
            return ""
        seconds = (time.monotonic() - self._began) * (self._total - self._done) / self._done
        return f", about {duration(seconds)} left"
