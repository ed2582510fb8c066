"""``sweep.json``: what a sweep is. Commands in the same folder may add points, not change those that are there."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ttt_jax import config as config_lib
from ttt_jax.config.renamed import current_values
from ttt_jax.errors import ConfigError
from ttt_jax.storage.json_files import DamagedFile, read_object, write_object
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep.axes import Axis
from ttt_jax.sweep.files import on_each
from ttt_jax.sweep.names import Value, text
from ttt_jax.sweep.points import Point
from ttt_jax.training import resume

NAME = "sweep.json"
_VERSION = 1
_OF_ALL = ("training.duration", "optimizer.spike_factor")  # may change, but the runs would not be comparable


class Sweep(NamedTuple):
    """A sweep.

    Attributes:
      base: the values of the keys that are set for all points.
      axes: of the newest command.
      points: of all commands, in the order in which they came.
    """

    base: dict[str, Value]
    axes: list[Axis]
    points: list[Point]

    @property
    def keys(self) -> list[str]:
        """The keys that are swept."""
        return list(dict.fromkeys(key for point in self.points for key in point.values))

    @property
    def recipes(self) -> list[str]:
        """The recipes that are compared."""
        return list(dict.fromkeys(point.recipe for point in self.points))


def read(directory: Workdir) -> Sweep | None:
    """The sweep of a folder; None where there is none.

    Raises:
      ConfigError: where the file is not that of a sweep, or of a newer version.
    """
    path = directory / NAME
    try:
        content = read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DamagedFile as error:
        raise ConfigError(
            f"{error}; or rename it and give the commands of the sweep again: runs that are done are not run again"
        ) from error
    version = content.get("version")
    if version != _VERSION:
        raise ConfigError(f"{path}: version {version}; expected version {_VERSION}, of a sweep")
    try:
        axes = [Axis(tuple(axis["keys"]), tuple(map(tuple, axis["rows"]))) for axis in content["axes"]]
        points = [Point(**point) for point in content["points"]]
        points = [point._replace(values=current_values(point.values)) for point in points]
        return Sweep(current_values(content["base"]), axes, points)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a sweep: {type(error).__name__}: {error}") from error


def expected(directory: Workdir) -> Sweep:
    """The sweep of a folder, which has to be there."""
    sweep = read(directory)
    if sweep is None:
        raise ConfigError(f"{directory}: holds no {NAME}; expected the --workdir of a ttt sweep")
    return sweep


def write(directory: Workdir, sweep: Sweep) -> None:
    """Write the file as a whole."""
    content = {
        "version": _VERSION,
        "base": sweep.base,
        "axes": [axis._asdict() for axis in sweep.axes],
        "points": [point._asdict() for point in sweep.points],
    }
    write_object(directory / NAME, content)


def merged(directory: Workdir, there: Sweep | None, here: Sweep) -> Sweep:
    """The sweep after a command has added its points; those that were there stay.

    Raises:
      ConfigError: where the command sets other values for all points than those before it did.
    """
    if there is None:
        return here
    new = {point.name: point for point in here.points}
    kept = [point for point in there.points if point.name not in new]
    different = {key for key in there.base.keys() | here.base.keys() if there.base.get(key) != here.base.get(key)}
    refused = [key for key in sorted(different) if not config_lib.may_change(key) or (kept and key in _OF_ALL)]
    if refused:
        listed = ", ".join(f"{key} {_shown(there.base, key)} there, {_shown(here.base, key)} here" for key in refused)
        raise ConfigError(
            f"--workdir {directory}: holds a sweep with another base ({listed}); expected the same --config.KEY=VALUE "
            "for all points, or a new folder"
        )
    known = {point.name for point in there.points}
    points = [new.get(point.name, point) for point in there.points]
    return here._replace(points=points + [point for point in here.points if point.name not in known])


def check_started(directory: Workdir, points: Sequence[Point], configs: Sequence[Any]) -> None:
    """Raises :class:`ConfigError` where the folder of a point holds a run of another config."""
    on_each(lambda pair: resume.check_same_run(pair[1], directory / pair[0].name), zip(points, configs, strict=True))


def _shown(base: Mapping[str, Value], key: str) -> str:
    return text(base[key]) if key in base else "not set"
