"""Rank the points of a sweep by a metric, for people and for other programs."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from ttt_jax import finite
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
    config: dict[str, Value]  # by dotted key; of a point that has not begun, the keys that it sets
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

    def read(point: Point) -> tuple[Result, Mapping[str, Any]]:
        workdir = directory / point.name
        config = flat(renamed.current(files.json_object(workdir / "config.json") or {})) | point.values
        if several:
            config[CONFIG] = recipe_label(point.recipe)
        value, step, tokens = metric.of_run(workdir, name)
        standing = status.of_point(workdir, point, is_live)
        return Result(None, standing, config, value, step if metric.is_of_evaluation(name) else standing.step), tokens

    found = files.on_each(read, sweep.points)
    begun = [point.name for point, (result, _) in zip(sweep.points, found, strict=True) if result.standing.step]
    if begun and all(result.value is None for result, _ in found):
        known = ", ".join(metric.available(directory / begun[0]))
        raise ConfigError(f"--metric {name}: no point has it; expected one of {known}")
    _check_same_tokens(name, {r.standing.point.name: tokens for r, tokens in found if r.value is not None})
    return Results(keys, _ranked([result for result, _ in found], highest))


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
    def order(result: Result) -> tuple[int, float]:
        if not result.is_finished or result.is_not_finite:
            return (1 if result.is_finished else 2), 0.0
        return 0, (-1 if highest else 1) * (result.value or 0.0)

    ranked = enumerate(sorted(results, key=order), 1)
    return [each._replace(rank=None if order(each)[0] else rank) for rank, each in ranked]


def as_json(results: Results, name: str) -> str:
    """Return the results as JSON: null for a value that is not finite, with ``not_finite`` beside it."""
    rows = map(finite.for_json, _rows(results, name))
    return json.dumps([row | {"not_finite": True} if count else row for row, count in rows], indent=2, allow_nan=False)


def as_csv(results: Results, name: str) -> str:
    """Return the results as CSV, with a line of names; ``nan`` and ``inf`` where a value is not finite."""
    rows, text = _rows(results, name), io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(results: Results, name: str) -> list[dict[str, Any]]:
    return [
        {
            "rank": each.rank,
            "point": each.standing.point.name,
            "state": each.standing.state,
            "step": each.step,
            "steps": each.standing.point.steps,
            **{key: each.config.get(key) for key in results.keys},
            name: each.value,
        }
        for each in results.results
    ]


def table(results: Results, name: str) -> Table:
    """Return the table of ``ttt sweep results``."""
    rows = [
        {
            "rank": str(each.rank or ""),
            "point": each.standing.point.name,
            **{short_key(key): status.key_value(each.config.get(key)) for key in results.keys},
            name: status.number_text(each.value, ".6g"),
            "step": f"{each.step}/{each.standing.point.steps}",
            "state": each.standing.state,
        }
        for each in results.results
    ]
    return status.table_of(rows, (name, "step"), [short_key(key) for key in results.keys])
