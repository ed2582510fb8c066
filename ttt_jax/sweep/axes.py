"""Read the axes of a sweep from text, which is matched and never run.

Values are a list, ``VALUE,VALUE,...``. A value with a comma is quoted, single or double; quoted text is taken as it is.
A range stands for the values in it, and may be an entry of a list:

    log:LOW:HIGH:N      N numbers from LOW to HIGH, equal ratios, to six digits
    linear:LOW:HIGH:N   N numbers from LOW to HIGH, equal steps
    pow2:LOW:HIGH       the powers of two from LOW to HIGH
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ttt_jax.errors import ConfigError

MOST = 10_000  # values of a list, points of a sweep: more is a slip

_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,"']*))\s*(,|$)""")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_RANGES = {
    "log": f"log:LOW:HIGH:N, two different positive numbers and N from 2 to {MOST}",
    "linear": f"linear:LOW:HIGH:N, two different numbers and N from 2 to {MOST}",
    "pow2": "pow2:LOW:HIGH, powers of two, LOW not above HIGH, such as pow2:1:2048",
}


class Axis(NamedTuple):
    """Keys that advance together: dotted ``keys``, and in each row of ``rows`` the text that each key is set to."""

    keys: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def from_options(grids: Sequence[str], zips: Sequence[Sequence[str]], constant: Mapping[str, str]) -> list[Axis]:
    """Return the axes of each ``--grid KEY=VALUES``, then those of each ``--zip KEY=VALUES ...``.

    Args:
      constant: keys that are set for all points.

    Raises:
      ConfigError: for text that is not ``KEY=VALUES``, a key in two places, or a group of unequal lengths.
    """
    axes = []
    seen = {key: f"--config.{key}" for key in constant}
    for option, texts in [*(("--grid", [text]) for text in grids), *(("--zip", texts) for texts in zips)]:
        columns: dict[str, list[str]] = {}
        for text in texts:
            match = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", text, re.DOTALL)
            if match is None:
                raise ConfigError(f"{option} {text}: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3")
            key = match[1]
            if key in seen:
                raise ConfigError(f"{option} {key}: is set by {seen[key]} already; expected each key in one place")
            seen[key], columns[key] = option, values(match[2], f"{option} {text}")
        if len({len(column) for column in columns.values()}) > 1:
            lengths = ", ".join(f"{len(column)} of {key}" for key, column in columns.items())
            raise ConfigError(f"{option}: {lengths}; expected as many values of each key")
        axes.append(Axis(tuple(columns), tuple(zip(*columns.values(), strict=True))))
    points = math.prod(len(axis.rows) for axis in axes)
    if points > MOST:
        raise ConfigError(f"--grid, --zip: {points:,} points; expected at most {MOST:,}")
    return axes


def product(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Return what each point sets, as text; the last axis advances first."""
    keys = [key for axis in axes for key in axis.keys]
    chosen = itertools.product(*(axis.rows for axis in axes))
    return [dict(zip(keys, itertools.chain(*rows), strict=True)) for rows in chosen]


def values(text: str, option: str) -> list[str]:
    """Return the values of a list, each as the text that a key is set to.

    Args:
      option: what the user typed, for the message of :class:`ConfigError`.
    """
    found: list[str] = []
    place, more = 0, True
    while more:
        match = _ITEM.match(text, place)
        if match is None:
            expected = 'VALUE,VALUE or "A, B",VALUE'
            raise ConfigError(f"{option}: cannot be read from {text[place:]!r} on; expected {expected}")
        double, single, plain, comma = match.groups()
        if plain is None:
            found.append(single if double is None else double)
        elif plain.strip():
            found += _expanded(plain.strip(), option)
        else:
            raise ConfigError(f'{option}: an empty value; expected VALUE,VALUE,... (in quotes, "", for an empty text)')
        place, more = match.end(), comma == ","
    return found


def _expanded(text: str, option: str) -> list[str]:
    kind, *texts = text.split(":")
    if kind not in _RANGES or not texts:
        return [text]
    numbers = [float(each) for each in texts if _NUMBER.fullmatch(each)]
    found = _range(kind, numbers) if len(numbers) == len(texts) == (2 if kind == "pow2" else 3) else []
    if not found:
        raise ConfigError(f"{option}: {text}: expected {_RANGES[kind]} (in quotes, to take it as it is)")
    # Whole numbers have no point, so that keys that are integers take them.
    return [str(int(x)) if x.is_integer() and abs(x) < 1e15 else repr(x) for x in found]


def _range(kind: str, numbers: Sequence[float]) -> list[float]:
    """Return the values of a range; none where its numbers do not make one."""
    low, high, *rest = numbers
    if not all(map(math.isfinite, numbers)) or (kind != "linear" and min(low, high) <= 0):
        return []
    if kind == "pow2":
        (fraction, first), (other, last) = math.frexp(low), math.frexp(high)
        return [2.0 ** (n - 1) for n in range(first, last + 1)] if fraction == other == 0.5 else []
    count = rest[0]
    if low == high or count not in range(2, MOST + 1):
        return []
    parts = [i / (count - 1) for i in range(1, int(count) - 1)]
    if kind == "log":
        return [low, *(float(f"{low * (high / low) ** part:.6g}") for part in parts), high]
    return [low, *(float(f"{low + (high - low) * part:.12g}") for part in parts), high]
