"""What options of commands may be: types for argparse."""

import argparse
from collections.abc import Callable

SPLITS = ("train", "validation", "test")


def at_least(least: int) -> Callable[[str], int]:
    """A parser of integers that are not below ``least``."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {least} or more")
        return int(text)

    return parse


positive, not_negative = at_least(1), at_least(0)
