"""Read and write the files of a sweep: ``sweep.json``, and ``point.json`` and the records of each point.

``sweep.json`` says what the sweep is; commands in its folder add points, and change none of those that are there.
``point.json`` beside a run says what the sweep last did with the point, and how that ended.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, get_type_hints

from ttt_jax import config as config_lib
from ttt_jax.config.renamed import current_values
from ttt_jax.errors import ConfigError
from ttt_jax.storage import json_files
from ttt_jax.storage.workdir import Workdir, explained, is_local
from ttt_jax.sweep.points import Point, Value, value_text

SWEEP, POINT = "sweep.json", "point.json"
RUNNING, DONE, FAILED, STOPPED, STOPPED_EARLY = "running", "done", "failed", "stopped", "stopped early"
_VERSION = 1
_SAME_FOR_ALL = ("training.duration", "optimizer.spike_factor")  # may change, but runs would not be comparable
_AT_A_TIME = 16
_TAIL = 1 << 16  # bytes: more than a hundred records

T = TypeVar("T")
R = TypeVar("R")


# ---- sweep.json


class Sweep(NamedTuple):
    """A sweep."""

    base: dict[str, Value]  # that all points share
    points: list[Point]  # of all commands, in the order in which they came

    @property
    def keys(self) -> list[str]:
        """Return the keys that are swept."""
        return list(dict.fromkeys(key for point in self.points for key in point.values))


def find_sweep(directory: Workdir) -> Sweep | None:
    """Return the sweep in a folder; None where there is none; :class:`ConfigError` for a file that cannot be read."""
    path = directory / SWEEP
    try:
        content = json_files.read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json_files.DamagedFile as error:
        raise ConfigError(
            f"{error}; or rename it and give the commands of the sweep again: runs that are done are not run again"
        ) from error
    if content.get("version") != _VERSION:
        raise ConfigError(f"{path}: version {content.get('version')}; expected version {_VERSION}, of a sweep")
    try:
        points = [Point(**point) for point in content["points"]]
        points = [point._replace(values=current_values(point.values)) for point in points]
        return Sweep(current_values(content["base"]), points)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a sweep: {type(error).__name__}: {error}") from error


def read_sweep(directory: Workdir) -> Sweep:
    """Return the sweep in a folder; :class:`ConfigError` where there is none."""
    sweep = find_sweep(directory)
    if sweep is None:
        raise ConfigError(f"{directory}: holds no {SWEEP}; expected the --workdir of a ttt sweep")
    return sweep


def write_sweep(directory: Workdir, sweep: Sweep) -> None:
    """Write ``sweep.json`` as a whole."""
    points = [point._asdict() for point in sweep.points]
    json_files.write_object(directory / SWEEP, {"version": _VERSION, "base": sweep.base, "points": points})


def merged(directory: Workdir, old: Sweep | None, new: Sweep) -> Sweep:
    """Return the sweep after a command has added its points; :class:`ConfigError` where it has another base."""
    if old is None:
        return new
    points = {point.name: point for point in old.points} | {point.name: point for point in new.points}
    is_part = len(points) > len(new.points)
    there, here = ({key: value_text(value) for key, value in sweep.base.items()} for sweep in (old, new))
    refused = [
        f"{key} {there.get(key, 'not set')} there, {here.get(key, 'not set')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and (not config_lib.may_change(key) or (is_part and key in _SAME_FOR_ALL))
    ]
    if refused:
        raise ConfigError(
            f"--workdir {directory}: holds a sweep with another base ({', '.join(refused)}); expected the same "
            "--config.KEY=VALUE for all points, or a new folder"
        )
    return new._replace(points=list(points.values()))


# ---- point.json


@dataclasses.dataclass(frozen=True)
class Record:
    """An attempt at a point, which is running as far as its sweep knows, or has ended in another state."""

    state: str
    steps: int  # that were wanted
    status: int | None = None  # exit status, once it has ended; below 0 the signal that ended it
    said: str = ""  # the last line of its output, where it failed
    starts: int = 0  # processes of this command: one, and one more for each restart
    began: int | float = dataclasses.field(default_factory=time.time)  # seconds since 1970
    ended: int | float | None = None

    def is_final(self, steps: int, *, stopping_early: bool = False) -> bool:
        """Return whether nothing is left to do of a run of so many steps."""
        return self.steps >= steps and (self.state == DONE or (stopping_early and self.state == STOPPED_EARLY))

    def describe_exit(self) -> str:
        """Return the exit status, or the signal that ended the process, as text; empty while it runs."""
        if self.status is None or self.status >= 0:
            return "" if self.status is None else f"exit status {self.status}"
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by {names.get(-self.status, f'signal {-self.status}')}"


def read_record(workdir: Workdir) -> Record | None:
    """Return the record of a point; None where it has none, or a damaged one, which is told on standard error."""
    content = json_object(workdir / POINT)
    if content is None:
        return None
    kinds = get_type_hints(Record)
    found = {key: value for key, value in content.items() if key in kinds}
    has_kinds = all(isinstance(x, kinds[key]) and not isinstance(x, bool) for key, x in found.items())
    if {"state", "steps"} <= found.keys() and has_kinds:
        return Record(**found)
    json_files.warn_once(f"{workdir / POINT}: is not a record of a point of a sweep; passed over")
    return None


def write_record(workdir: Workdir, record: Record) -> None:
    """Write ``point.json`` as a whole."""
    json_files.write_object(workdir / POINT, dataclasses.asdict(record))


# ---- Files of runs


def on_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return ``[function(item) for item in items]``, several at a time, as files in a bucket take a while."""
    with ThreadPoolExecutor(_AT_A_TIME, "files") as pool:
        return list(pool.map(function, items))


def json_object(path: Workdir) -> dict[str, Any] | None:
    """Return the object in a file; None where there is none, or a damaged one, which is told on standard error."""
    try:
        return json_files.read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json_files.DamagedFile as error:
        json_files.warn_once(f"{error}; passed over")
        return None


def records(workdir: Workdir, *, newest: bool = False) -> list[dict[str, Any]]:
    """Return the records in ``metrics.jsonl`` of a run; damaged lines, or a file that cannot be read, are told.

    Args:
      newest: read the last 64 KiB only, and do not tell of damaged lines.
    """
    path = workdir / "metrics.jsonl"
    try:
        return json_files.read_lines(path, tail=_TAIL if newest else None).records
    except PermissionError as error:
        json_files.warn_once(f"{path}: cannot be read: {error.strerror}; passed over")
        return []


def last_written(workdir: Workdir) -> float | None:
    """Return when the last record of a run was written, in seconds since 1970; None where there is none."""
    path = workdir / "metrics.jsonl"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), explained(path):
        return float(getattr(path.stat(), "st_mtime" if is_local(path) else "mtime")) or None
    return None
