"""Draw a metric of a sweep against a swept key."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from ttt_jax import finite
from ttt_jax.errors import ConfigError
from ttt_jax.figures import style
from ttt_jax.sweep.points import Value, short_key, value_text
from ttt_jax.sweep.results import CONFIG, Result, Results

_SEED = "seed"
_MOST_TICKS = 12
_MOST_IN_PICTURE = 4  # names of lines; more would cover them


def against(results: Results, metric: str, output: Path, *, x: str, lines: str | None = None) -> None:
    """Draw the metric of the points against a key, and save it.

    A line joins points that are done, through the mean where several have the same value of the key; bars are the
    standard deviation of points that differ in the seed alone. Points that are not done are hollow, and no line joins
    them. Crosses at the lower edge are points whose value is NaN or infinite, which leave a gap in their line. The
    title counts these points, and those without a value yet.

    Args:
      output: a path that ends in .png, .pdf or .svg.
      x: a key of the config, swept or not; ``config`` is the recipe.
      lines: a line for each value of this key; by default, for each combination of the other swept keys but the seed.

    Raises:
      ConfigError: where a key is unknown, or no point has a value.
    """
    style.check_output(output, option="--plot")
    places = {each.standing.point.name: _value(results, each, x, "--x") for each in results.results}
    by = [lines] if lines is not None else _others(results, x)
    groups: dict[tuple, list[Result]] = {}
    for each in results.results:
        if each.value is not None and places[each.standing.point.name] is not None:
            groups.setdefault(tuple(_value(results, each, key, "--lines") for key in by), []).append(each)
    if not groups:
        raise ConfigError(f"--plot: no point has a value of {metric} yet")
    axis = _Axis([place for place in places.values() if place is not None])

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    hollow = means = spreads = False
    for index, (group, members) in enumerate(sorted(groups.items(), key=lambda item: tuple(map(_order, item[0])))):
        color, line, marker = style.SERIES[index % len(style.SERIES)]
        label = ", ".join(_label(key, value) for key, value in zip(by, group, strict=True))
        at: dict[float, list[Result]] = {}
        for each in members:
            done, place = each.is_finished, axis.place(places[each.standing.point.name])
            if each.is_not_finite:
                axes.plot(place, 0.02, "x", color=color, transform=axes.get_xaxis_transform(), zorder=3)
            else:
                hollow = hollow or not done
                fill = color if done else "white"
                axes.plot(place, each.value or 0.0, marker, color=color, markerfacecolor=fill, markersize=5, zorder=3)
            if done:
                at.setdefault(place, []).append(each)
        joined = sorted(at)
        middle = [finite.mean(each.value or 0.0 for each in at[place]) for place in joined]
        several = any(len(members) > 1 for members in at.values())
        means = means or several
        for place, mean in zip(joined, middle, strict=True):
            spread = _spread(results, at[place])
            if spread is not None:
                spreads = True
                axes.errorbar(place, mean, spread, color=color, capsize=4, linewidth=1.2, zorder=2.5)
        axes.plot(
            joined,
            [mean if math.isfinite(mean) else math.nan for mean in middle],
            color=color,
            linestyle=line,
            marker=None if several else marker,  # of points alone
            markersize=5,
            linewidth=1.8,
            label=style.literal(label) or None,
        )
    axis.prepare(axes)
    axes.set_xlabel(style.literal(f"{x} (log scale)" if axis.base else x))
    axes.set_ylabel(style.literal(metric))
    axes.set_title(style.literal(_title(results, metric, hollow=hollow, means=means, spreads=spreads)), fontsize=11)
    axes.grid(alpha=0.25, which="major")
    if by:
        if len(groups) > _MOST_IN_PICTURE:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8, edgecolor="none")
        else:
            axes.legend(loc="best", framealpha=0.8, edgecolor="none")
    style.save(figure, output)


class _Axis:
    """An x axis: logarithmic where values are spaced like that, else linear; values that are no numbers side by side.

    Attributes:
      base: of the logarithm; None for another axis.
    """

    def __init__(self, values: Sequence[Value]):
        self._values = sorted(set(values), key=_order)
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in self._values)
        self._numbers = [float(value) for value in self._values] if numeric else None
        self.base = _log_base(self._numbers) if self._numbers else None

    def place(self, value: Value | None) -> float:
        """Return where a value stands on the axis."""
        assert value is not None
        return float(self._values.index(value)) if self._numbers is None else float(value)

    def prepare(self, axes: plt.Axes) -> None:
        """Set the scale and the ticks: one for each value, unless there are many."""
        if self.base:
            axes.set_xscale("log", base=self.base)
        if self._numbers is None or len(self._values) <= _MOST_TICKS:
            texts = [style.literal(_text(value)) for value in self._values]
            axes.set_xticks([self.place(value) for value in self._values], texts)
            axes.xaxis.set_minor_locator(NullLocator())
        if max(len(_text(value)) for value in self._values) * len(self._values) > 70:
            axes.tick_params(axis="x", labelrotation=30)


def _log_base(numbers: Sequence[float]) -> int | None:
    """Return 2 for powers of two, 10 for other numbers whose ratios are more alike than their differences, or None."""
    if len(numbers) < 2 or numbers[0] <= 0:
        return None
    ratios = [math.log(b / a) for a, b in itertools.pairwise(numbers)]
    steps = [b - a for a, b in itertools.pairwise(numbers)]
    alike = numbers[1] / numbers[0] >= 2 if len(numbers) == 2 else max(ratios) / min(ratios) < max(steps) / min(steps)
    if not alike:
        return None
    return 2 if all(math.frexp(number)[0] == 0.5 for number in numbers) else 10


def _others(results: Results, x: str) -> list[str]:
    """Return the swept keys but the seed that differ between points with the same value of ``x``."""
    seen: dict[str, dict] = {key: {} for key in results.keys if key not in (x, _SEED)}
    for each in results.results:
        place = _value(results, each, x, "--x")
        for key, values in seen.items():
            values.setdefault(place, set()).add(_value(results, each, key, "--lines"))
    return [key for key, values in seen.items() if any(len(several) > 1 for several in values.values())]


def _value(results: Results, result: Result, key: str, option: str) -> Value | None:
    """Return the value of a key at a point; None where it is not known, as the point has not begun."""
    known = {*results.keys, *(name for each in results.results for name in each.config)}
    if key not in known:
        raise ConfigError(f"{option} {key}: no such key; expected one that is swept: {', '.join(results.keys)}")
    return result.config.get(key)


def _spread(results: Results, members: Sequence[Result]) -> float | None:
    """Return the standard deviation of points that differ in the seed alone; None for other points, or a single one."""
    values = [each.value for each in members if each.value is not None and math.isfinite(each.value)]
    others = [[each.config.get(key) for key in results.keys if key != _SEED] for each in members]
    if _SEED not in results.keys or len(values) < max(2, len(members)) or any(other != others[0] for other in others):
        return None
    return statistics.stdev(values)


def _title(results: Results, metric: str, *, hollow: bool, means: bool, spreads: bool) -> str:
    missing = sum(each.value is None for each in results.results)
    not_finite = sum(each.is_not_finite for each in results.results)
    parts = [f"{len(results.results)} points"]
    if means:
        parts.append("lines: means" + " +- standard deviation over seeds" * spreads)
    if hollow:
        parts.append("hollow: not finished")
    if not_finite:
        parts.append(f"crosses: {not_finite} not finite")
    if missing:
        parts.append(f"{missing} without a value yet")
    return f"{metric}, {'; '.join(parts)}"


def _order(value: Value | None) -> tuple:
    numeric = isinstance(value, int | float)
    return (not numeric, value if numeric else 0.0, str(value))


def _label(key: str, value: Value | None) -> str:
    return _text(value) if key == CONFIG else f"{short_key(key)} {_text(value)}"


def _text(value: Value | None) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else value_text(value)
