"""How the points of a sweep compare: ranked by a metric, as a table for other programs."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ttt_jax.config import renamed
from ttt_jax.errors import ConfigError
from ttt_jax.settings import flat
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric, names, record, status, sweep_file
from ttt_jax.sweep.names import Value
from ttt_jax.sweep.status import Standing

CONFIG = "config"  # a recipe, as if it were a key


class Result(NamedTuple):
    """What a point has come to.

    Attributes:
      rank: from 1, among the points that are done and have a finite value; None of all others.
      values: of the swept keys, and of the recipe where several are compared.
      value: of the metric, which may be NaN or infinite; None where there is none.
      step: that it is of.
    """

    rank: int | None
    standing: Standing
    values: dict[str, Value]
    value: float | None
    step: int


class Results(NamedTuple):
    """The results of a sweep.

    Attributes:
      keys: that are swept; the first is :data:`CONFIG` where several recipes are compared.
      results: ranked ones first, then those whose value is not finite, then those that are not finished, in the order
        of the sweep.
      configs: of each point, by keys of the config; empty of points that have not begun.
    """

    keys: list[str]
    results: list[Result]
    configs: dict[str, dict[str, Any]]


def of_sweep(directory: Workdir, name: str, *, highest: bool | None = None) -> Results:
    """The points of a sweep by a metric (see :mod:`ttt_jax.sweep.metric`).

    Points that are not done, or whose evaluation is not of their last step, have no rank; they are listed last.

    Args:
      highest: whether more is better; None is as the metric has it.

    Raises:
      ConfigError: where the folder holds no sweep, or no point has this metric, or evaluations are of different tokens.
    """
    sweep = sweep_file.expected(directory)
    keys = [CONFIG] * (len({names.label(recipe) for recipe in sweep.recipes}) > 1) + sweep.keys
    lives = status.is_at_work(directory)

    def one(point):
        workdir = directory / point.name
        config = flat(renamed.current(files.json_object(workdir / "config.json") or {}))
        values = {key: config[key] for key in keys if key in config} | point.values
        if CONFIG in keys:
            values[CONFIG] = names.label(point.recipe)
        value, step, tokens = metric.of_run(workdir, name)
        standing = status.of_point(workdir, point, lives)
        return (
            Result(None, standing, values, value, step if metric.is_of_evaluation(name) else standing.step),
            config,
            tokens,
        )

    found = files.on_each(one, sweep.points)
    results = [result for result, _, _ in found]
    if all(result.value is None for result in results) and any(result.standing.step for result in results):
        with_records = next(result.standing.point for result in results if result.standing.step)
        known = ", ".join(metric.available(directory / with_records.name))
        raise ConfigError(f"--metric {name}: no point has it; expected one of {known}")
    _check_same_tokens(name, [(r.standing.point.name, tokens) for r, _, tokens in found if r.value is not None])
    configs = {result.standing.point.name: config for result, config, _ in found}
    return Results(keys, _ranked(results, metric.higher_is_better(name) if highest is None else highest), configs)


def _check_same_tokens(name: str, found: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    (first, there), *others = found or [("", {})]
    for point, here in others:
        for key in there.keys() & here.keys():
            if there[key] != here[key]:
                raise ConfigError(
                    f"--metric {name}: is of other tokens in {first} ({key} {there[key]}) than in {point} ({key} "
                    f"{here[key]}); expected evaluations of the same data and as many windows"
                )


def _ranked(results: Sequence[Result], highest: bool) -> list[Result]:
    finished = [each for each in results if is_finished(each)]
    others = [each for each in results if not is_finished(each)]

    def place(each: Result) -> float:
        assert each.value is not None
        return -each.value if highest else each.value

    ranked = sorted((each for each in finished if not is_not_finite(each)), key=place)
    not_finite = [each for each in finished if is_not_finite(each)]
    return [each._replace(rank=rank) for rank, each in enumerate(ranked, 1)] + not_finite + others


def is_finished(result: Result) -> bool:
    """Whether a result is of a run that is done, at its end."""
    standing = result.standing
    return standing.state == record.DONE and result.value is not None and result.step == standing.step


def is_not_finite(result: Result) -> bool:
    """Return whether there is a value, and it is NaN or infinite."""
    return result.value is not None and not math.isfinite(result.value)


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
            name: None if is_not_finite(each) else each.value,
            **({"not_finite": True} if is_not_finite(each) else {}),
        }
        for each in results.results
    ]


def as_csv(results: Results, name: str) -> str:
    """Return the results as CSV, with a line of names; ``nan`` and ``inf`` where a value is not finite."""
    table = rows(results, name)
    for row, each in zip(table, results.results, strict=True):
        row.pop("not_finite", None)
        row[name] = each.value
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
