"""Read the axes of a sweep from text, which is matched and never run.

Values are a list, ``VALUE,VALUE,...``. A value with a comma is quoted, single or double; quoted text is taken as it is.
A range stands for the values in it, and may be an entry of a list:

    log:LOW:HIGH:N      N numbers from LOW to HIGH, equal ratios, to six digits
    linear:LOW:HIGH:N   N numbers from LOW to HIGH, equal steps
    pow2:LOW:HIGH       the powers of two from LOW to HIGH
"""

import functools
import itertools
import math
import operator
import re
from collections.abc import Mapping, Sequence

from ttt_jax.errors import ConfigError

_MOST = 10_000  # values of a list, points of a sweep: more is a slip

_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,"']*))\s*(,|$)""")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_RANGES = {
    "log": f"log:LOW:HIGH:N, two different positive numbers and N from 2 to {_MOST}",
    "linear": f"linear:LOW:HIGH:N, two different numbers and N from 2 to {_MOST}",
    "pow2": "pow2:LOW:HIGH, powers of two, LOW not above HIGH, such as pow2:1:2048",
}


def combinations(
    grids: Sequence[str], zips: Sequence[Sequence[str]], constant: Mapping[str, str], recipes: int = 1
) -> list[dict[str, str]]:
    """Return what each point of a recipe sets, as text by key; the last option advances first.

    Args:
      grids: ``KEY=VALUES`` of each ``--grid``: every value is combined with all others.
      zips: several ``KEY=VALUES`` for each ``--zip``, whose values advance together.
      constant: keys that are set for all points.
      recipes: how many recipes are run at all points.

    Raises:
      ConfigError: for text that cannot be read, a key in two places, a group of unequal lengths, or too many points.
    """
    axes = []
    seen = {key: f"--config.{key}" for key in constant}
    for option, texts in [*(("--grid", [text]) for text in grids), *(("--zip", texts) for texts in zips)]:
        columns: dict[str, list[str]] = {}
        for text in texts:
            key, equals, listed = text.partition("=")
            if not key or not equals:
                raise ConfigError(f"{option} {text}: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3")
            if key in seen:
                raise ConfigError(f"{option} {key}: is set by {seen[key]} already; expected each key in one place")
            seen[key], columns[key] = option, values(listed, f"{option} {text}")
        if len(set(map(len, columns.values()))) > 1:
            lengths = ", ".join(f"{len(column)} of {key}" for key, column in columns.items())
            raise ConfigError(f"{option}: {lengths}; expected as many values of each key")
        axes.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    points = recipes * math.prod(map(len, axes))
    if points > _MOST:
        raise ConfigError(f"--config, --grid, --zip: {points:,} points; expected at most {_MOST:,}")
    return [functools.reduce(operator.or_, chosen, {}) for chosen in itertools.product(*axes)]


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
    """Return the values of a range as text, or other text as it is."""
    kind, *texts = text.split(":")
    if kind not in _RANGES or not texts:
        return [text]
    numbers = [float(each) for each in texts if _NUMBER.fullmatch(each)]
    is_complete = len(numbers) == len(texts) == (2 if kind == "pow2" else 3) and all(map(math.isfinite, numbers))
    found = _range(kind, *numbers) if is_complete else []
    if not found:
        raise ConfigError(f"{option}: {text}: expected {_RANGES[kind]} (in quotes, to take it as it is)")
    # Whole numbers have no point, so that keys that are integers take them.
    return [str(int(x)) if x.is_integer() and abs(x) < 1e15 else repr(x) for x in found]


def _range(kind: str, low: float, high: float, count: float = 0) -> list[float]:
    """Return the values of a range; none where its numbers do not make one."""
    if kind != "linear" and min(low, high) <= 0:
        return []
    if kind == "pow2":
        (fraction, first), (other, last) = math.frexp(low), math.frexp(high)
        return [2.0 ** (n - 1) for n in range(first, last + 1)] if fraction == other == 0.5 else []
    if low == high or count not in range(2, _MOST + 1):
        return []
    parts = [i / (count - 1) for i in range(1, int(count) - 1)]
    if kind == "log":
        return [low, *(float(f"{low * (high / low) ** part:.6g}") for part in parts), high]
    return [low, *(float(f"{low + (high - low) * part:.12g}") for part in parts), high]
