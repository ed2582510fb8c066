"""Make the points of a sweep: read what is swept, check every config, and name the points and their commands.

What is swept is text, which is matched and never run: a list of values, ranges (``_RANGES``) and quoted text.
"""

import functools
import hashlib
import itertools
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir

Value: TypeAlias = bool | int | float | str  # of a config key

_MOST = 10_000  # values of a list, points of a sweep: more is a slip

_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,"']*))\s*(,|$)""")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_RANGES = {
    "log": f"log:LOW:HIGH:N, two different positive numbers and N from 2 to {_MOST}",
    "linear": f"linear:LOW:HIGH:N, two different numbers and N from 2 to {_MOST}",
    "pow2": "pow2:LOW:HIGH, powers of two, LOW not above HIGH, such as pow2:1:2048",
}
_LONGEST = 100  # characters: a name is seen in tables, and jobs are named after it
_UNSAFE = re.compile(r"[^\w.-]", re.ASCII)  # in the name of a folder


class Point(NamedTuple):
    """A run of a sweep."""

    name: str  # of its folder
    recipe: str  # FILE[:ARG]
    values: dict[str, Value]  # that it sets, by key
    steps: int  # of the optimizer


def make(
    recipes: Sequence[str],
    constant: Mapping[str, str],
    overrides: Sequence[Mapping[str, str]],
    existing: Sequence[Point] = (),
) -> list[tuple[Point, ml_collections.ConfigDict]]:
    """Return the points of a command with their configs, which are all valid.

    Args:
      recipes: ``FILE[:ARG]``; the outermost axis.
      constant: what all points set, by key, as text.
      overrides: what each point of a recipe sets.
      existing: points of earlier commands; equal points keep their names.

    Raises:
      ConfigError: for a config that cannot be run, or two points that are the same run.
    """
    labels: dict[str, str] = {}
    for recipe in recipes:
        label = recipe_label(recipe)
        if label in labels:
            raise ConfigError(f"--config {recipe}: has the name of --config {labels[label]}; expected different names")
        labels[label] = recipe
    named = {_exact(recipe_label(point.recipe), point.values): point.name for point in existing}
    several = len({*labels, *(recipe_label(point.recipe) for point in existing)}) > 1
    made: list[tuple[Point, ml_collections.ConfigDict]] = []
    same: dict[str, str] = {}
    for label, override in itertools.product(labels, overrides):
        config = _config(labels[label], constant, override)
        values = {key: config_lib.value_of(config, key) for key in override}
        name = named.get(_exact(label, values)) or name_of(label if several or not values else None, values)
        twin = same.setdefault(json.dumps(config.to_dict(), sort_keys=True), name)
        if len(same) == len(made):
            raise ConfigError(f"points {twin} and {name}: are the same run; expected different ones")
        made.append((Point(name, labels[label], values, config_lib.steps(config, "training.duration")), config))
    return made


def _config(recipe: str, constant: Mapping[str, str], override: Mapping[str, str]) -> ml_collections.ConfigDict:
    settings = [f"--config.{key}={value}" for key, value in {**constant, **override}.items()]
    try:
        return config_lib.from_arguments(["--config", recipe, *settings])
    except ConfigError as error:
        where = [recipe, *(f"{key}={value}" for key, value in override.items())]
        raise ConfigError(f"point {', '.join(where)}: {error}") from error


# ---- What is swept


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
            seen[key], columns[key] = option, parse_values(listed, f"{option} {text}")
        if len(set(map(len, columns.values()))) > 1:
            lengths = ", ".join(f"{len(column)} of {key}" for key, column in columns.items())
            raise ConfigError(f"{option}: {lengths}; expected as many values of each key")
        axes.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    points = recipes * math.prod(map(len, axes))
    if points > _MOST:
        raise ConfigError(f"--config, --grid, --zip: {points:,} points; expected at most {_MOST:,}")
    return [functools.reduce(operator.or_, chosen, {}) for chosen in itertools.product(*axes)]


def parse_values(text: str, option: str) -> list[str]:
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
    steps = [i / (count - 1) for i in range(1, int(count) - 1)]
    between = [f"{low * (high / low) ** x:.6g}" if kind == "log" else f"{low + (high - low) * x:.12g}" for x in steps]
    return [low, *map(float, between), high]


# ---- Commands


def command(
    point: Point, base: Mapping[str, Value], workdir: Workdir, launcher: Sequence[str] = (), options: Sequence[str] = ()
) -> list[str]:
    """Return the arguments of ``ttt`` that train a point in its workdir.

    Args:
      base: the values that all points share.
      launcher: ``launch TARGET options``, to train elsewhere.
      options: of ``ttt train``.
    """
    settings = [f"--config.{key}={value_text(value)}" for key, value in {**base, **point.values}.items()]
    train = ["train", "--config", point.recipe, *settings, "--workdir", str(workdir), *options]
    return [*launcher, "--", *train] if launcher else train


# ---- Names


def name_of(recipe: str | None, values: Mapping[str, Value]) -> str:
    """Return the name of a point, and of its folder: ``peak_lr=0.001,width=512``, keys in alphabetical order.

    Different points have different names: a name that would not tell, or is too long, ends in a hash of the point.

    Args:
      recipe: its label, in a sweep of several recipes.
    """
    parts = sorted(f"{short_key(key)}={_spelled(value)}" for key, value in values.items())
    texts = [value for value in values.values() if isinstance(value, str)]
    is_exact = all(_spelled(text).replace("pct", "%").replace("-", " ") == text for text in texts)
    if recipe is not None:
        parts.insert(0, re.sub(_UNSAFE, "-", recipe.replace(":", ".")))
        is_exact = is_exact and re.fullmatch(r"[\w-]+(:[\w-]+(\.[\w-]+)*)?", recipe, re.ASCII) is not None
    name = ",".join(parts)
    if is_exact and len(name) <= _LONGEST:
        return name
    digest = hashlib.blake2b(_exact(recipe, values).encode(), digest_size=4).hexdigest()
    return f"{name[: _LONGEST - len(digest) - 1]}-{digest}"


def recipe_label(recipe: str) -> str:
    """Return ``FILE[:ARG]`` without folder and suffix, such as ``quickstart:ttt_linear``."""
    file, colon, argument = recipe.partition(":")
    return Path(file).stem + colon + argument


@functools.cache
def short_key(key: str) -> str:
    """Return the shortest end of a key that no other key ends in: ``peak_lr``, but ``log.every``."""
    keys = config_lib.settings()
    ends = [key.split(".", dots)[-1] for dots in range(key.count("."), -1, -1)] if key in keys else []
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)


def value_text(value: Value) -> str:
    """Return a value as ``--config.KEY=`` takes it: equal values have equal texts."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _spelled(value: Value) -> str:
    """Return a value as names have it."""
    if isinstance(value, str):
        return re.sub(_UNSAFE, "-", value.replace("%", "pct"))  # "10%" and "300 steps" are common
    return value_text(value).replace("e+", "e").removesuffix(".0")


def _exact(recipe: str | None, values: Mapping[str, Value]) -> str:
    """Return text that is equal for equal points alone."""
    return json.dumps([recipe, dict(sorted(values.items()))])
