"""Tell where the points of a sweep stand, from files alone: on any machine that sees the folder."""

import collections
import time
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
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
_STYLES = {
    RUNNING: "cyan",
    FAILED: "red",
    STOPPED: "yellow",
    STOPPED_EARLY: "magenta",
    WAITING: "dim",
    DONE: "green",
}


class Standing(NamedTuple):
    """Where a point stands.

    Attributes:
      state: waiting, or a state of :class:`~ttt_jax.sweep.files.Record`.
      step: of its newest record, 0 where there is none; ``loss`` and ``tokens_per_second`` are of that record too.
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
    if record is None:
        state, note = STOPPED if newest else WAITING, ""  # begun by hand, perhaps
    else:
        begun = record.state == RUNNING and not is_live
        shorter = record.state == DONE and record.steps < point.steps  # the sweep has been made longer since
        state = STOPPED if begun or shorter else record.state
        killed = record.exit_in_words() if (record.status or 0) < 0 or not record.said else ""
        note = "; ".join(filter(None, (killed, record.said))) if state == FAILED else ""
    if not newest:
        return Standing(point, state, note=note)
    written = files.last_written(workdir)
    return Standing(
        point,
        state,
        step=point.steps if state == DONE else newest[-1]["step"],  # records may be some steps apart
        loss=next(iter(metric.numbers(newest[-1:], "loss")), None),
        tokens_per_second=metric.of_records(newest[-20:], "tokens_per_second").number,  # one step says little
        age=None if written is None else max(0.0, time.time() - written),
        note=note,
    )


# ---- Tables


def in_short(standings: Sequence[Standing]) -> str:
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
    shown = new_table("point", "state", title=in_short(standings))
    for name in ("step", "loss", "tokens/s", "last record"):
        shown.add_column(name, justify="right", no_wrap=True)
    if has_notes:
        shown.add_column("why", overflow="fold")
    for each in standings:
        shown.add_row(
            each.point.name,
            state_text(each.state),
            f"{each.step}/{each.point.steps}",
            number_text(each.loss, ".4f"),
            number_text(each.tokens_per_second, ",.0f"),
            "" if each.age is None else f"{duration(each.age)} ago",
            *([Text(each.note)] if has_notes else []),
        )
    return shown


def table_of_points(points: Sequence[Point], keys: Sequence[str]) -> Table:
    """Return the table of ``ttt sweep --dry-run``."""
    several = len({point.recipe for point in points}) > 1
    shown = new_table("point", *["config"] * several)
    for name in (*keys, "steps"):
        shown.add_column(name, justify="right")
    for point in points:
        values = (key_value(point.values.get(key)) for key in keys)
        shown.add_row(point.name, *[point.recipe] * several, *values, str(point.steps))
    return shown


def new_table(*columns: str, title: str | None = None) -> Table:
    """Return a table with these columns and no rows."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def state_text(state: str) -> Text:
    """Return a state in its colour."""
    return Text(state, style=_STYLES.get(state, ""))


def number_text(value: float | None, style: str) -> str:
    """Return a number in a format; empty where there is none."""
    return "" if value is None else finite.format_number(value, style)


def key_value(value: Value | None) -> str:
    """Return the value of a key as tables show it."""
    return "" if value is None else value_text(value).removesuffix(".0")
