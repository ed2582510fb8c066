"""Rank the points of a sweep by a metric, for people and for other programs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from ttt_jax.config import renamed
from ttt_jax.errors import ConfigError
from ttt_jax.settings import flat
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric, status
from ttt_jax.sweep.points import Point, Value, recipe_label, short_key
from ttt_jax.sweep.status import Standing

CONFIG = "config"  # a recipe, as if it were a key


class Result(NamedTuple):
    """The result of a point."""

    rank: int | None  # from 1; None unless the point is done and its value finite
    standing: Standing
    values: dict[str, Value]  # of the swept keys
    value: float | None  # of the metric, which may be NaN or infinite; None where there is none
    step: int  # at which the metric has this value

    @property
    def is_finished(self) -> bool:
        """Return whether the value is of the end of a run that is done."""
        return self.standing.state == files.DONE and self.value is not None and self.step == self.standing.step

    @property
    def is_not_finite(self) -> bool:
        """Return whether there is a value, and it is NaN or infinite."""
        return self.value is not None and not math.isfinite(self.value)


class Results(NamedTuple):
    """The results of a sweep: ranked, then with values that are not finite, then not finished, in the sweep's order."""

    keys: list[str]  # that are swept; the first is CONFIG where several recipes are compared
    results: list[Result]
    configs: dict[str, dict[str, Any]]  # by point and key; empty for points that have not begun


def of_sweep(directory: Workdir, name: str, *, highest: bool | None = None) -> Results:
    """Return the points of a sweep by a metric (see :mod:`ttt_jax.sweep.metric`).

    Points that are not done, or whose evaluation is not of their last step, have no rank; they are listed last.

    Args:
      highest: whether more is better; None is the metric's own order.

    Raises:
      ConfigError: where there is no sweep, no point has this metric, or evaluations are of different tokens.
    """
    sweep = files.read_sweep(directory)
    several = len({recipe_label(point.recipe) for point in sweep.points}) > 1
    keys = [CONFIG] * several + sweep.keys
    is_live = status.is_at_work(directory)
    highest = metric.higher_is_better(name) if highest is None else highest

    def read(point: Point) -> tuple[Result, dict[str, Any], Mapping[str, Any]]:
        workdir = directory / point.name
        config = flat(renamed.current(files.json_object(workdir / "config.json") or {}))
        values = {key: config[key] for key in keys if key in config} | point.values
        if several:
            values[CONFIG] = recipe_label(point.recipe)
        value, step, tokens = metric.of_run(workdir, name)
        standing = status.of_point(workdir, point, is_live)
        step = step if metric.is_of_evaluation(name) else standing.step
        return Result(None, standing, values, value, step), config, tokens

    found = files.on_each(read, sweep.points)
    results = [result for result, _, _ in found]
    begun = [result.standing.point.name for result in results if result.standing.step]
    if begun and all(result.value is None for result in results):
        known = ", ".join(metric.available(directory / begun[0]))
        raise ConfigError(f"--metric {name}: no point has it; expected one of {known}")
    _check_same_tokens(name, {r.standing.point.name: tokens for r, _, tokens in found if r.value is not None})
    configs = {result.standing.point.name: config for result, config, _ in found}
    return Results(keys, _ranked(results, highest), configs)


def _check_same_tokens(name: str, tokens: Mapping[str, Mapping[str, Any]]) -> None:
    for point, here in tokens.items():
        first, there = next(iter(tokens.items()))
        for key in there.keys() & here.keys():
            if there[key] != here[key]:
                raise ConfigError(
                    f"--metric {name}: is of other tokens in {first} ({key} {there[key]}) than in {point} ({key} "
                    f"{here[key]}); expected evaluations of the same data and as many windows"
                )


def _ranked(results: Sequence[Result], highest: bool) -> list[Result]:
    def place(result: Result) -> float:
        return (-1 if highest else 1) * (result.value or 0.0)

    finished = [each for each in results if each.is_finished]
    ranked = sorted((each for each in finished if not each.is_not_finite), key=place)
    not_finite = [each for each in finished if each.is_not_finite]
    others = [each for each in results if not each.is_finished]
    return [each._replace(rank=rank) for rank, each in enumerate(ranked, 1)] + not_finite + others


def rows(results: Results, name: str) -> list[dict[str, Any]]:
    """Return the results as JSON can hold them: null for a value that is not finite, with ``not_finite`` beside it."""
    return [
        {
            "rank": each.rank,
            "point": each.standing.point.name,
            "state": each.standing.state,
            "step": each.step,
            "steps": each.standing.point.steps,
            **{key: each.values.get(key) for key in results.keys},
            name: None if each.is_not_finite else each.value,
            **({"not_finite": True} if each.is_not_finite else {}),
        }
        for each in results.results
    ]


def as_csv(results: Results, name: str) -> str:
    """Return the results as CSV, with a line of names; ``nan`` and ``inf`` where a value is not finite."""
    lines = [{**row, name: each.value} for row, each in zip(rows(results, name), results.results, strict=True)]
    text = io.StringIO(newline="")
    columns = [column for column in lines[0] if column != "not_finite"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def table(results: Results, name: str) -> Table:
    """Return the table of ``ttt sweep results``."""
    rows = [
        {
            "rank": str(each.rank or ""),
            "point": each.standing.point.name,
            **{short_key(key): status.key_value(each.values.get(key)) for key in results.keys},
            name: status.number_text(each.value, ".6g"),
            "step": f"{each.step}/{each.standing.point.steps}",
            "state": each.standing.state,
        }
        for each in results.results
    ]
    return status.table_of(rows, (name, "step"), [short_key(key) for key in results.keys])
