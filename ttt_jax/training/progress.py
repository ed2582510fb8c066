"""What a person sees of a run: a live line on a terminal, a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Step, loss, tokens per second, step time and time to the end.

    Args:
      total: steps of the whole run.
      start: steps done before this process.
      tokens_per_step: tokens of one global batch.
    """

    def __init__(self, total: int, start: int, tokens_per_step: int):
        self._total, self._tokens = total, tokens_per_step
        self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.fields[text]}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total, completed=start, text="compiling")
            self._bar.start()

    def update(self, step: int, loss: float, seconds_per_step: float) -> None:
        """Shows where the run is."""
        left = _duration(seconds_per_step * (self._total - step))
        text = (
            f"step {step}/{self._total}  loss {loss:.4f}  {self._tokens / seconds_per_step:,.0f} tokens/s  "
            f"{seconds_per_step:.3f} s/step  {left} left"
        )
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self._total or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
