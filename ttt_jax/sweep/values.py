"""What a swept key takes, from text: lists, ranges and powers of two. Text is matched, never run.

A list is ``VALUE,VALUE,...``. A value that holds a comma stands in quotes, single or double; what is quoted is taken as
it is. A range stands for the values that it holds, and may be one entry of a list:

    log:LOW:HIGH:N      N numbers from LOW to HIGH, equal ratios, to six digits
    linear:LOW:HIGH:N   N numbers from LOW to HIGH, equal steps
    pow2:LOW:HIGH       the powers of two from LOW to HIGH
"""

import math
import re

from ttt_jax.errors import ConfigError

MOST = 10_000  # values of a list, points of a sweep: more is a slip

_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,"']*))\s*(,|$)""")
_RANGE = re.compile(r"(log|linear|pow2):(.*)")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_FORMS = "log:LOW:HIGH:N, linear:LOW:HIGH:N or pow2:LOW:HIGH"


def parse(text: str, option: str) -> list[str]:
    """The values of a list, each as the text that a key is set to.

    Args:
      option: what the user typed, for messages.

    Raises:
      ConfigError: for an empty list or value, a quote that is not closed, or a range that cannot be.
    """
    values: list[str] = []
    place, more = 0, True
    while more:
        match = _ITEM.match(text, place)
        if match is None:
            raise ConfigError(
                f'{option}: cannot be read from {text[place:]!r} on; expected VALUE,VALUE or "A, B",VALUE'
            )
        double, single, plain, comma = match.groups()
        if plain is None:
            values.append(single if double is None else double)
        elif not plain.strip():
            raise ConfigError(f'{option}: an empty value; expected VALUE,VALUE,... (in quotes, "", for an empty text)')
        else:
            values += _expanded(plain.strip(), option)
        place, more = match.end(), comma == ","
    return values


def _expanded(text: str, option: str) -> list[str]:
    match = _RANGE.fullmatch(text)
    if match is None:
        return [text]
    kind, numbers = match[1], match[2].split(":")
    wanted = 2 if kind == "pow2" else 3
    if len(numbers) != wanted or not all(_NUMBER.fullmatch(number) for number in numbers):
        raise ConfigError(f"{option}: {text}: expected {_FORMS} (in quotes, to take it as it is)")
    low, high = float(numbers[0]), float(numbers[1])
    if not (math.isfinite(low) and math.isfinite(high)) or (kind != "linear" and not (low > 0 and high > 0)):
        raise ConfigError(f"{option}: {text}: expected {'' if kind == 'linear' else 'positive, '}finite LOW and HIGH")
    if kind == "pow2":
        return _powers(low, high, f"{option}: {text}")
    if not numbers[2].isdecimal() or not 2 <= int(numbers[2]) <= MOST or low == high:
        raise ConfigError(f"{option}: {text}: expected two different ends and N from 2 to {MOST}")
    between, last = range(1, int(numbers[2]) - 1), int(numbers[2]) - 1
    if kind == "log":
        inner = [float(f"{low * (high / low) ** (i / last):.6g}") for i in between]
    else:
        inner = [float(f"{low + (high - low) * (i / last):.12g}") for i in between]
    return [_text(value) for value in (low, *inner, high)]


def _powers(low: float, high: float, what: str) -> list[str]:
    if low > high or math.frexp(low)[0] != 0.5 or math.frexp(high)[0] != 0.5:
        raise ConfigError(f"{what}: expected powers of two, LOW not above HIGH, such as pow2:1:2048")
    exponents = range(math.frexp(low)[1] - 1, math.frexp(high)[1])
    return [_text(2.0**exponent) for exponent in exponents]


def _text(value: float) -> str:
    """Whole numbers without a point, so that keys that are integers take them."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
