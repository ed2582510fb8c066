"""Parse whole numbers on the command line, as types for argparse."""

import argparse
from collections.abc import Callable


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
