"""Compute with, format and store numbers that may be NaN, infinite or missing."""

import math
from collections.abc import Iterable
from typing import Any

NOT_FINITE = "not finite"


def exp(x: float | None) -> float:
    """Return e^x: infinity where it overflows, NaN where ``x`` is NaN or None."""
    if x is None:
        return math.nan
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def mean(values: Iterable[float]) -> float:
    """Return the mean: NaN or infinite where one of the values is, NaN for no values."""
    values = list(values)
    if not values:
        return math.nan
    if not all(map(math.isfinite, values)):
        return sum(values)
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(value / len(values) for value in values)


def is_finite(value: float | None) -> bool:
    """Return whether a value is a finite number; None is not."""
    return value is not None and math.isfinite(value)


def for_json(value: Any) -> tuple[Any, int]:
    """Return a JSON value with None for numbers that are not finite, and how many there were."""
    if isinstance(value, float):
        return (value, 0) if math.isfinite(value) else (None, 1)
    if isinstance(value, dict):
        pairs = {key: for_json(each) for key, each in value.items()}
        return {key: each for key, (each, _) in pairs.items()}, sum(n for _, n in pairs.values())
    if isinstance(value, (list, tuple)):
        elements = [for_json(each) for each in value]
        return [each for each, _ in elements], sum(n for _, n in elements)
    return value, 0


def format_number(value: float | None, spec: str) -> str:
    """Return a number in a format; "not finite" where it is NaN, infinite or None."""
    return format(value, spec) if value is not None and math.isfinite(value) else NOT_FINITE
