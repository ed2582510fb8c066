"""Where the points of a sweep stand, from files alone: any machine that sees the folder can tell."""

import collections
import time
from collections.abc import Sequence
from typing import NamedTuple

from ttt_jax.storage import workdir_lock
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric, record, sweep_file
from ttt_jax.sweep.points import Point
from ttt_jax.sweep.process import in_words
from ttt_jax.sweep.record import Record

WAITING = "waiting"


class Standing(NamedTuple):
    """Where a point stands.

    Attributes:
      state: waiting, or one of :class:`~ttt_jax.sweep.record.Record`.
      step: of the newest record of its metrics, 0 where there is none; ``loss`` and ``tokens_per_second`` are its.
      age: seconds since that record was written.
      note: why it failed.
    """

    point: Point
    state: str
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    age: float | None = None
    note: str = ""


def in_short(standings: Sequence[Standing]) -> str:
    """How many points are in which state."""
    counts = collections.Counter(each.state for each in standings)
    return f"{len(standings)} points: {', '.join(f'{count} {state}' for state, count in counts.items())}"


def of_sweep(directory: Workdir) -> list[Standing]:
    """Where each point of a sweep stands.

    Raises:
      ConfigError: where the folder holds no sweep.
    """
    sweep = sweep_file.expected(directory)
    lives = is_at_work(directory)
    return files.on_each(lambda point: of_point(directory / point.name, point, lives), sweep.points)


def is_at_work(directory: Workdir) -> bool:
    """Return whether a command works on the sweep, as far as can be seen from here."""
    found = files.json_object(directory / workdir_lock.NAME)
    return found is not None and workdir_lock.is_live(found)


def of_point(workdir: Workdir, point: Point, lives: bool) -> Standing:
    """Where a point stands.

    Args:
      lives: whether a command works on the sweep; of a point whose record says that it is running, nothing is without.
    """
    known = record.read(workdir)
    newest = files.records(workdir / "metrics.jsonl", newest=True)
    state = _state(known, point, lives, bool(newest))
    note = "" if known is None or state != record.FAILED else _reason(known)
    if not newest:
        return Standing(point, state, note=note)
    last, written = newest[-1], files.written(workdir / "metrics.jsonl")
    age = None if written is None else max(0.0, time.time() - written)
    step = point.steps if state == record.DONE else last["step"]  # records may be some steps apart
    speed = metric.of_records(newest[-20:], "tokens_per_second").number  # that of one step says little
    return Standing(point, state, step, next(iter(metric.numbers([last], "loss")), None), speed, age, note)


def _state(known: Record | None, point: Point, lives: bool, has_records: bool) -> str:
    if known is None:
        return record.STOPPED if has_records else WAITING  # begun by hand, perhaps
    if known.state == record.RUNNING and not lives:
        return record.STOPPED
    if known.state == record.DONE and known.steps < point.steps:
        return record.STOPPED  # the sweep has been made longer since
    return known.state


def _reason(known: Record) -> str:
    parts = [in_words(known.status)] if known.status is not None and (known.status < 0 or not known.said) else []
    return "; ".join([*parts, known.said] if known.said else parts)
