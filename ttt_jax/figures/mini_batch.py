"""Perplexity and time of a step against the mini-batch size b of the inner loop (Figure 7)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import published as published_lib
from ttt_jax.figures import points as points_lib
from ttt_jax.figures import style
from ttt_jax.figures.points import Point
from ttt_jax.models import pattern
from ttt_jax.settings import flat
from ttt_jax.sweep import files, metric

_KEY = "model.ttt.mini_batch"


def by_mini_batch(
    places: Sequence[str], outputs: Sequence[Path], *, split: str = "validation", published: bool = False, **which: Any
) -> None:
    """Draws perplexity and seconds per training step against b, side by side, and saves the picture.

    Where the paper has the forward time of one layer, here stands the median time of a training step of the runs.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      published: with the perplexity that the paper states.

    Raises:
      ConfigError: for runs that were not evaluated or have no inner loop, are not of one text, or that the paper
        states nothing about.
    """
    style.check_output(*outputs)
    points = points_lib.of_places(places, split, **which)
    points_lib.check_same_text(points)
    for point in points:
        if not pattern.learns(ConfigDict(point.config["model"])):
            raise ConfigError(f"{point.workdir}: {point.about['model']} has no mini-batches; expected a TTT layer")
    seconds = dict(zip((p.workdir for p in points), files.on_each(_seconds, points), strict=True))
    sizes = sorted({_b(point) for point in points})
    styles = points_lib.styles(points)
    figure, (left, right) = style.panels(2)
    left.set_yscale("log")
    for name, line in points_lib.grouped(points, lambda p: points_lib.line_of(p.about)).items():
        look = styles[name].of_points
        left.plot(*zip(*points_lib.joined(line, _b), strict=True), label=name, **look)
        timed = sorted(
            (b, s) for b, s in ((_b(p), seconds[p.workdir]) for p in line) if s is not None and math.isfinite(s)
        )
        if timed:
            right.plot(*zip(*timed, strict=True), label=name, **look)
    points_lib.note_not_finite(left, points)
    if published:
        _draw_stated(left, points)
    left.set_ylabel("perplexity (log scale)")
    right.set_ylabel("seconds per training step (median)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 1.4)
        axes.xaxis.set_major_locator(ticker.FixedLocator(sizes))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: style.tokens(x)))
        axes.tick_params(axis="x", labelsize=8 if len(sizes) > 8 else None)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("mini-batch size b of the inner loop, tokens (log scale)", fontsize=9)
        axes.grid(alpha=0.25)
    style.log_ticks(left.yaxis)
    context = ", ".join(style.tokens(c) for c in sorted({p.about["training_context"] for p in points}))
    figure.suptitle(f"Mini-batch size, {points_lib.data_name(points)}, {context} tokens", fontsize=11)
    style.legend_below(figure)
    style.save(figure, *outputs)


def _draw_stated(axes: Axes, points: Sequence[Point]) -> None:
    stated = published_lib.TTT_LINEAR
    b = stated.config[_KEY]
    # b is the axis: the paper's point belongs to the line whose other keys are those of its model.
    at_its_context = [p for p in points if p.about["training_context"] == published_lib.CONTEXT]
    like = [p for p in at_its_context if published_lib.of(flat(p.config) | {_KEY: b}) == stated]
    name = next((points_lib.line_of(p.about) for p in like), None)
    if name is None:
        raise ConfigError(
            f"--published: the paper states the perplexity of TTT-Linear (Mamba backbone) at {published_lib.CONTEXT} "
            "tokens, and of none of these runs"
        )
    axes.plot(b, stated.perplexity, label=f"paper: {name}, {published_lib.WHERE}", **style.of(name).hollow)


def _b(point: Point) -> int:
    return min(point.config["model"]["ttt"]["mini_batch"], point.about["training_context"])


def _seconds(point: Point) -> float | None:
    """Median over the run, so that compiling and saving do not count; None where no time was recorded."""
    return metric.of_run(point.workdir, "seconds_per_step").number
