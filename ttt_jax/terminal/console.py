"""Write text for people, show progress of long commands, and parse whole numbers of the command line."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 10.0
_WIDE = 1000  # characters: files and other programs take lines of any length


def literal(**options: Any) -> "Console":
    """Return a console without markup, emoji and highlights: brackets and colons in names are shown as they are.

    Args:
      options: other options of :class:`rich.console.Console`.
    """
    from rich.console import Console  # late: most modules need the words alone

    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})


def output() -> "Console":
    """Return a console on standard output, as wide as the terminal, or very wide elsewhere."""
    return literal(width=None if sys.stdout.isatty() else _WIDE)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 file``, ``2,000 files``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, and how many more there are: ``a, b and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def duration(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours where there are some: ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.fields[text]}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:.0f}%"),
            )
            self._bar = Progress(*columns, console=literal(stderr=True), transient=True)
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


# ---- Whole numbers on the command line, as types for argparse


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of integers that are not below ``least``."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {least} or more")
        return int(text)

    return parse


positive, not_negative = at_least(1), at_least(0)


def counts(text: str) -> list[int]:
    """Parse positive integers with commas between them, where ``k`` stands for 1024: ``2048,8k``."""
    numbers = []
    for part in text.split(","):
        number, factor = (part[:-1], 1024) if part.endswith("k") else (part, 1)
        if not number.strip().isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"{part!r}: expected integers from 1, such as 2048 or 2k,8k")
        numbers.append(int(number) * factor)
    return numbers


def count(text: str) -> int:
    """Parse one positive integer, as :func:`counts` does: ``2048`` or ``2k``."""
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one integer from 1, such as 2048 or 2k")
    return counts(text)[0]
