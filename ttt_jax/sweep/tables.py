"""Tables of a sweep, for people."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ttt_jax import finite
from ttt_jax.sweep import names, record
from ttt_jax.sweep.results import Result
from ttt_jax.sweep.status import WAITING, Standing, in_short
from ttt_jax.terminal.console import duration

_STYLES = {
    record.RUNNING: "cyan",
    record.FAILED: "red",
    record.STOPPED: "yellow",
    record.STOPPED_EARLY: "magenta",
    WAITING: "dim",
    record.DONE: "green",
}


def of_status(standings: Sequence[Standing], *, active_first: bool = False) -> Table:
    """What ``ttt sweep status`` shows.

    Args:
      active_first: begins with the points that run, as a terminal may not have a line for each.
    """
    if active_first:
        standings = sorted(standings, key=lambda each: list(_STYLES).index(each.state))
    table = _table("point", "state", title=in_short(standings))
    for name in ("step", "loss", "tokens/s", "last record"):
        table.add_column(name, justify="right", no_wrap=True)
    notes = any(each.note for each in standings)
    if notes:
        table.add_column("why", overflow="fold")
    for each in standings:
        ago = "" if each.age is None else f"{duration(each.age)} ago"
        table.add_row(
            each.point.name,
            _state(each.state),
            f"{each.step}/{each.point.steps}",
            _number(each.loss, ".4f"),
            _number(each.tokens_per_second, ",.0f"),
            ago,
            *([Text(each.note)] if notes else []),
        )
    return table


def of_results(results: Sequence[Result], keys: Sequence[str], metric: str) -> Table:
    """What ``ttt sweep results`` shows.

    Args:
      keys: the swept ones, a column for each.
    """
    table = _table("rank", "point")
    for key in keys:
        table.add_column(names.short(key), justify="right")
    table.add_column(metric, justify="right", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for each in results:
        table.add_row(
            "" if each.rank is None else str(each.rank),
            each.standing.point.name,
            *(("" if key not in each.values else shown(each.values[key])) for key in keys),
            _number(each.value, ".6g"),
            f"{each.step}/{each.standing.point.steps}",
            _state(each.standing.state),
        )
    return table


def of_points(points: Sequence[Any], keys: Sequence[str]) -> Table:
    """What ``ttt sweep --dry-run`` shows."""
    several = len({point.recipe for point in points}) > 1
    table = _table("point", *(["config"] if several else []))
    for key in keys:
        table.add_column(key, justify="right")
    table.add_column("steps", justify="right")
    for point in points:
        row = [point.name, *([point.recipe] if several else [])]
        table.add_row(*row, *(shown(point.values[key]) for key in keys), str(point.steps))
    return table


def shown(value: names.Value | None) -> str:
    """The value of a key."""
    return "" if value is None else names.text(value).removesuffix(".0")


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))


def _number(value: float | None, style: str) -> str:
    return "" if value is None else finite.format_number(value, style)
