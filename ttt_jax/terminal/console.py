"""Consoles that show names and values as they are: brackets are no markup, and colons around a word no emoji."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

_WIDE = 1000  # characters: a file, or another program, takes lines of any length


def literal(**options: Any) -> Console:
    """Return a console that shows text as it is; ``options`` are those of :class:`rich.console.Console`."""
    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})


def output() -> Console:
    """Return standard output, as wide as the terminal, or as wide as it takes."""
    return literal(width=None if sys.stdout.isatty() else _WIDE)


def counted(number: int, noun: str) -> str:
    """Return ``1 file``, ``2,000 files``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, and how many more there are: ``a, b and 3 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours where there are some."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
