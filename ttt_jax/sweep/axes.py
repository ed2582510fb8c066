"""The axes of a sweep: a grid key alone, or several keys that advance together. A sweep is their product."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ttt_jax.errors import ConfigError
from ttt_jax.sweep import values
from ttt_jax.sweep.values import MOST


class Axis(NamedTuple):
    """Keys that advance together.

    Attributes:
      keys: dotted, as in ``--config.KEY``.
      rows: what they are set to, as text: a row for each place on the axis, in the order of the keys.
    """

    keys: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def from_options(grids: Sequence[str], zips: Sequence[Sequence[str]], constant: Mapping[str, str]) -> list[Axis]:
    """The axes that a command names, grids first.

    Args:
      grids: ``KEY=VALUES`` of each ``--grid``.
      zips: groups of ``KEY=VALUES``, of each ``--zip``.
      constant: keys that are set for all points.

    Raises:
      ConfigError: for what is no ``KEY=VALUES``, a key in two places, or a group of unequal lengths.
    """
    groups = [("--grid", [text]) for text in grids] + [("--zip", list(texts)) for texts in zips]
    axes = [_axis(option, texts) for option, texts in groups]
    seen = {key: f"--config.{key}" for key in constant}
    for (option, _), axis in zip(groups, axes, strict=True):
        for key in axis.keys:
            if key in seen:
                raise ConfigError(f"{option} {key}: is set by {seen[key]} already; expected each key in one place")
            seen[key] = option
    points = math.prod(len(axis.rows) for axis in axes)
    if points > MOST:
        raise ConfigError(f"--grid, --zip: {points:,} points; expected at most {MOST:,}")
    return axes


def product(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """What each point sets, as text; the last axis advances first."""
    return [
        {key: value for axis, row in zip(axes, rows, strict=True) for key, value in zip(axis.keys, row, strict=True)}
        for rows in itertools.product(*(axis.rows for axis in axes))
    ]


def _axis(option: str, texts: Sequence[str]) -> Axis:
    lists: dict[str, list[str]] = {}
    for text in texts:
        match = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", text, re.DOTALL)
        if match is None:
            raise ConfigError(f"{option} {text}: expected KEY=VALUE,VALUE,... such as optimizer.peak_lr=1e-3,3e-3")
        if match[1] in lists:
            raise ConfigError(f"{option} {match[1]}: is set by {option} already; expected each key in one place")
        lists[match[1]] = values.parse(match[2], f"{option} {text}")
    if len({len(column) for column in lists.values()}) > 1:
        lengths = ", ".join(f"{len(column)} of {key}" for key, column in lists.items())
        raise ConfigError(f"{option}: {lengths}; expected as many values of each key")
    return Axis(tuple(lists), tuple(zip(*lists.values(), strict=True)))
