"""Words of messages."""

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """Return ``1 file``, ``2,000 files``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in one line, and a sign that there are more."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
