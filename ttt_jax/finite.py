"""Numbers that may be NaN or infinite: they show in means and in words, and JSON holds null in their place."""

import math
from collections.abc import Iterable
from typing import Any

NOT_FINITE = "not finite"


def exp(x: float | None) -> float:
    """Return e^x, infinity where it overflows, and NaN where ``x`` is NaN or not known."""
    if x is None:
        return math.nan
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def mean(values: Iterable[float]) -> float:
    """Return the mean, which is NaN or infinite where one of the values is, and NaN of no values."""
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
    """Return whether there is a value, and it is finite."""
    return value is not None and math.isfinite(value)


def for_json(value: Any) -> tuple[Any, int]:
    """Return JSON in which numbers that are not finite are null, and how many there are."""
    if isinstance(value, float):
        return (value, 0) if math.isfinite(value) else (None, 1)
    if isinstance(value, dict):
        pairs = {key: for_json(each) for key, each in value.items()}
        return {key: each for key, (each, _) in pairs.items()}, sum(n for _, n in pairs.values())
    if isinstance(value, (list, tuple)):
        found = [for_json(each) for each in value]
        return [each for each, _ in found], sum(n for _, n in found)
    return value, 0


def format_number(value: float | None, style: str) -> str:
    """Return a number in a format, and "not finite" where it is NaN, infinite or null."""
    return format(value, style) if value is not None and math.isfinite(value) else NOT_FINITE
