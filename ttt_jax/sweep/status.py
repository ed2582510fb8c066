"""Tell where the points of a sweep stand, from files alone: on any machine that sees the folder."""

import collections
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from ttt_jax import finite
from ttt_jax.storage import workdir_lock
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric
from ttt_jax.sweep.files import DONE, FAILED, RUNNING, STOPPED, STOPPED_EARLY
from ttt_jax.sweep.points import Point, Value, value_text
from ttt_jax.terminal.console import duration

WAITING = "waiting"
_STYLES = {RUNNING: "cyan", FAILED: "red", STOPPED: "yellow", STOPPED_EARLY: "magenta", WAITING: "dim", DONE: "green"}


class Standing(NamedTuple):
    """The state of a point and its newest record."""

    point: Point
    state: str  # waiting, or a state of a Record
    step: int = 0  # of its newest record, as loss and speed; 0 where there is none
    loss: float | None = None
    tokens_per_second: float | None = None
    age: float | None = None  # seconds since the newest record was written
    note: str = ""  # why it failed


def of_sweep(directory: Workdir) -> list[Standing]:
    """Return where each point of a sweep stands; :class:`ConfigError` where the folder holds no sweep."""
    sweep = files.read_sweep(directory)
    is_live = is_at_work(directory)
    return files.on_each(lambda point: of_point(directory / point.name, point, is_live), sweep.points)


def is_at_work(directory: Workdir) -> bool:
    """Return whether a command works on the sweep, as far as can be seen from this machine."""
    found = files.json_object(directory / workdir_lock.NAME)
    return found is not None and workdir_lock.is_live(found)


def of_point(workdir: Workdir, point: Point, is_live: bool) -> Standing:
    """Return where a point stands.

    Args:
      is_live: whether a command works on the sweep; without one, no point is running.
    """
    record, newest = files.read_record(workdir), files.records(workdir, newest=True)
    state, note = STOPPED if newest else WAITING, ""  # begun by hand, perhaps
    if record is not None:
        begun = record.state == RUNNING and not is_live
        shorter = record.state == DONE and record.steps < point.steps  # the sweep has been made longer since
        state = STOPPED if begun or shorter else record.state
    if record is not None and state == FAILED:
        killed = record.describe_exit() if (record.status or 0) < 0 or not record.said else ""
        note = "; ".join(filter(None, (killed, record.said)))
    written = files.last_written(workdir) if newest else None
    step = newest[-1]["step"] if newest else 0
    return Standing(
        point,
        state,
        step=point.steps if newest and state == DONE else step,  # records may be some steps apart
        loss=next(iter(metric.numbers(newest[-1:], "loss")), None),
        tokens_per_second=metric.of_records(newest[-20:], "tokens_per_second").number,  # one step says little
        age=None if written is None else max(0.0, time.time() - written),
        note=note,
    )


# ---- Tables


def summary(standings: Sequence[Standing]) -> str:
    """Return how many points are in which state."""
    counts = collections.Counter(each.state for each in standings)
    return f"{len(standings)} points: {', '.join(f'{count} {state}' for state, count in counts.items())}"


def table(standings: Sequence[Standing], *, active_first: bool = False) -> Table:
    """Return the table of ``ttt sweep status``.

    Args:
      active_first: begin with the points that run, as a terminal may not have a line for each.
    """
    if active_first:
        standings = sorted(standings, key=lambda each: list(_STYLES).index(each.state))
    has_notes = any(each.note for each in standings)
    rows = [
        {
            "point": each.point.name,
            "state": each.state,
            "step": f"{each.step}/{each.point.steps}",
            "loss": number_text(each.loss, ".4f"),
            "tokens/s": number_text(each.tokens_per_second, ",.0f"),
            "last record": "" if each.age is None else f"{duration(each.age)} ago",
            **({"why": each.note} if has_notes else {}),
        }
        for each in standings
    ]
    return table_of(rows, ("step", "loss", "tokens/s", "last record"), title=summary(standings))


def table_of_points(points: Sequence[Point], keys: Sequence[str]) -> Table:
    """Return the table of ``ttt sweep --dry-run``."""
    several = len({point.recipe for point in points}) > 1
    rows = [
        {
            "point": point.name,
            **({"config": point.recipe} if several else {}),
            **{key: key_value(point.values.get(key)) for key in keys},
            "steps": str(point.steps),
        }
        for point in points
    ]
    return table_of(rows, ("steps",), keys)


def table_of(
    rows: Sequence[Mapping[str, str]], numbers: Sequence[str], keys: Sequence[str] = (), title: str | None = None
) -> Table:
    """Return a table of rows by column; numbers and values of keys stand to the right, and numbers are never broken."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    for name in rows[0]:
        justify: JustifyMethod = "right" if name in (*numbers, *keys) else "left"
        made.add_column(name, justify=justify, overflow="fold", no_wrap=name in numbers)
    for row in rows:
        made.add_row(*(Text(x, style=_STYLES[x]) if name == "state" else x for name, x in row.items()))
    return made


def number_text(value: float | None, style: str) -> str:
    """Return a number in a format; empty where there is none."""
    return "" if value is None else finite.format_number(value, style)


def key_value(value: Value | None) -> str:
    """Return the value of a key as tables show it."""
    return "" if value is None else value_text(value).removesuffix(".0")
