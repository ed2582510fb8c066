"""The points of a sweep, each with its config read and checked before any of them starts."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.sweep import names
from ttt_jax.sweep.names import Value
from ttt_jax.sweep.values import MOST


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its folder.
      recipe: ``FILE[:ARG]`` of its config.
      values: what it sets, by key, of the types of the keys.
      steps: optimizer steps of the run.
    """

    name: str
    recipe: str
    values: dict[str, Value]
    steps: int

    @property
    def identity(self) -> str:
        """Equal for points that are the same, whatever they are called."""
        return json.dumps([names.label(self.recipe), dict(sorted(self.values.items()))])


class Points(NamedTuple):
    """The points of a command.

    Attributes:
      points: in the order in which they run.
      configs: of each.
      base: the values of the keys that are set for all points.
    """

    points: list[Point]
    configs: list[ml_collections.ConfigDict]
    base: dict[str, Value]


def make(
    recipes: Sequence[str],
    constant: Mapping[str, str],
    overrides: Sequence[Mapping[str, str]],
    existing: Sequence[Point] = (),
) -> Points:
    """Reads and validates the config of every point.

    Args:
      recipes: ``FILE[:ARG]``; the outermost axis.
      constant: keys that are set for all points, as text.
      overrides: what each point of a recipe sets, as text.
      existing: points of earlier commands; the same ones keep their names.

    Raises:
      ConfigError: naming the point, where a config cannot be run; where two points are the same run; where there are
        too many.
    """
    _check_recipes(recipes)
    if len(recipes) * len(overrides) > MOST:
        raise ConfigError(f"{len(recipes) * len(overrides):,} points; expected at most {MOST:,}")
    named = {point.identity: point.name for point in existing}
    several = len({names.label(recipe) for recipe in (*recipes, *(point.recipe for point in existing))}) > 1
    made = Points([], [], {})
    same: dict[str, str] = {}
    for recipe in recipes:
        for override in overrides:
            config = _config(recipe, constant, override)
            values = {key: _value(config, key) for key in override}
            point = Point("", recipe, values, config_lib.steps(config, "training.duration"))
            label = names.label(recipe)
            name = named.get(point.identity) or names.of(label if several or not values else None, values)
            twin = same.setdefault(json.dumps(config.to_dict(), sort_keys=True), name)
            if len(same) == len(made.points):
                raise ConfigError(f"points {twin} and {name}: are the same run; expected different ones")
            made.points.append(point._replace(name=name))
            made.configs.append(config)
            made.base.update({key: _value(config, key) for key in constant})
    return made


def _config(recipe: str, constant: Mapping[str, str], override: Mapping[str, str]) -> ml_collections.ConfigDict:
    settings = [f"--config.{key}={value}" for key, value in {**constant, **override}.items()]
    try:
        return config_lib.from_arguments(["--config", recipe, *settings])
    except ConfigError as error:
        where = ", ".join(f"{key}={value}" for key, value in override.items())
        raise ConfigError(f"point {recipe}{', ' * bool(where)}{where}: {error}") from error


def _check_recipes(recipes: Sequence[str]) -> None:
    labels: dict[str, str] = {}
    for recipe in recipes:
        label = names.label(recipe)
        if label in labels:
            raise ConfigError(f"--config {recipe}: has the name of --config {labels[label]}; expected different names")
        labels[label] = recipe


def _value(config: ml_collections.ConfigDict, key: str) -> Value:
    value = config
    for part in key.split("."):
        value = value[part]
    return value
