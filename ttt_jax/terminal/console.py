"""Write text for people: consoles that show names and values as they are, and words for numbers, lists and times."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

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
