"""Consoles that show names and values as they are: brackets are no markup, and colons around a word no emoji."""

import sys
from typing import Any

from rich.console import Console

_WIDE = 1000  # characters: a file, or another program, takes lines of any length


def literal(**options: Any) -> Console:
    """Return a console that shows text as it is; ``options`` are those of :class:`rich.console.Console`."""
    return Console(**{"markup": False, "emoji": False, "highlight": False, **options})


def output() -> Console:
    """Return standard output, as wide as the terminal, or as wide as it takes."""
    return literal(width=None if sys.stdout.isatty() else _WIDE)
