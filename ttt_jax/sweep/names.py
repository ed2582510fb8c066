"""Names of points: readable, safe as the name of a folder, and a function of the point alone."""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from ttt_jax import config as config_lib

Value: TypeAlias = bool | int | float | str  # of a config key

_LONGEST = 100  # characters: a name is seen in tables, and jobs are named after it
_SPELLED = (("%", "pct"), (" ", "-"))  # "10%" and "300 steps" are common


def of(recipe: str | None, values: Mapping[str, Value]) -> str:
    """The name of a point: ``peak_lr=0.001,width=512``, keys in alphabetical order.

    Equal points have equal names, and different points different ones: where that cannot be read off, for a text that
    no folder can be called or a name that is too long, a hash of the point stands at the end.

    Args:
      recipe: the label of the recipe, in a sweep of several.
      values: what the point sets.
    """
    parts = [f"{short(key)}={_spelled(value)}" for key, value in sorted(values.items(), key=lambda x: short(x[0]))]
    plain = all(_can_be_read_back(value) for value in values.values())
    if recipe is not None:
        parts.insert(0, _safe(recipe.replace(":", ".")))
        plain = plain and re.fullmatch(r"[\w-]+(:[\w-]+(\.[\w-]+)*)?", recipe, re.ASCII) is not None
    name = ",".join(parts)
    if plain and len(name) <= _LONGEST:
        return name
    exact = json.dumps([recipe, dict(sorted(values.items()))])
    digest = hashlib.blake2b(exact.encode(), digest_size=4).hexdigest()
    return f"{name[: _LONGEST - len(digest) - 1]}-{digest}"


def label(recipe: str) -> str:
    """``FILE[:ARG]`` without the folder: ``quickstart:ttt_linear``, wherever it lies."""
    file, colon, argument = recipe.partition(":")
    return Path(file).stem + colon + argument


def short(key: str) -> str:
    """The end of a key that no other key ends in: ``peak_lr``, but ``log.every``."""
    return _short_keys().get(key, key)


def text(value: Value) -> str:
    """A value as ``--config.KEY=`` takes it: equal values give equal texts."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _short_keys() -> dict[str, str]:
    keys = list(config_lib.settings())
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return found


def _spelled(value: Value) -> str:
    if isinstance(value, str):
        for character, spelling in _SPELLED:
            value = value.replace(character, spelling)
        return _safe(value)
    return text(value).replace("e+", "e").removesuffix(".0")


def _can_be_read_back(value: Value) -> bool:
    if not isinstance(value, str):
        return True
    read = _spelled(value)
    for character, spelling in _SPELLED:
        read = read.replace(spelling, character)
    return read == value


def _safe(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text, flags=re.ASCII)
