"""Draw perplexity against training FLOPs, training context, and mini-batch size.

By FLOPs, with a line per kind of model through its sizes: Figures 2 (left), 10, 11 and 15 of the paper. By context:
Figure 16. By the mini-batch size b of the inner loop, with the time of a step: Figure 7.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.figures import points as points_lib
from ttt_jax.figures import published as published_lib
from ttt_jax.figures import style
from ttt_jax.figures.points import Point
from ttt_jax.figures.style import Style
from ttt_jax.models import counts, pattern
from ttt_jax.settings import flat
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric
from ttt_jax.training import run_config

_MINI_BATCH = "model.ttt.mini_batch"


def perplexity_by_flops(
    places: Sequence[str],
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    contexts: Sequence[int] | None = None,
    published: bool = False,
    **which: Any,
) -> None:
    """Draw perplexity against training FLOPs, a panel for each training context, and save the figure.

    Training FLOPs are computed from the config of the model (:mod:`ttt_jax.models.counts`), up to the evaluated step.
    Those of a fine-tuned model include the run that it started from. Points are joined, as in the paper, which found no
    curve that fits them.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      contexts: training contexts to draw; None for all.
      published: add the perplexities that the paper states.
      which: arguments of :func:`points.of_places` that choose evaluations.

    Raises:
      ConfigError: if runs were not evaluated or are not of one text, or if the paper states nothing about them.
    """
    style.check_output(*outputs)
    points = points_lib.of_places(places, split, contexts, **which)
    by_context = dict(sorted(points_lib.grouped(points, lambda p: p.about["training_context"]).items()))
    if published and not any(_stated(members) for members in by_context.values()):
        raise ConfigError(
            f"--published: the paper states perplexities of the models of its Table 1 at {published_lib.CONTEXT} "
            "tokens, and of none of these runs"
        )
    styles = points_lib.styles(points)
    figure, panels = style.panels(len(by_context))
    for axes, (context, members) in zip(panels, by_context.items(), strict=True):
        points_lib.check_same_text(members)
        style.log_scale(axes.xaxis)
        style.log_scale(axes.yaxis)
        for name, line in points_lib.grouped(members, lambda p: points_lib.model_label(p.about)).items():
            pairs = points_lib.joined(line, _training_flops)
            axes.plot(*zip(*pairs, strict=True), label=name, **style.joined_points(styles[name]))
        points_lib.note_not_finite(axes, members)
        for name, stated in _stated(members) if published else []:
            _draw_stated(axes, published_lib.training_flops(stated), name, stated)
        axes.set_title(f"{points_lib.data_name(members)}, {style.tokens(context)} tokens", fontsize=11)
        axes.set_xlabel("training FLOPs (log scale)")
        axes.set_ylabel("perplexity (log scale)")
        style.log_ticks(axes.xaxis)
        style.log_ticks(axes.yaxis)
        axes.grid(alpha=0.25)
    style.legend_below(figure)
    style.save(figure, *outputs)


def _training_flops(point: Point) -> float:
    started = point.config["training"].get("start_from")
    return point.about["training_flops"] + (_flops_of_run(started, point.workdir) if started else 0.0)


def _flops_of_run(location: str, asked_by: Workdir) -> float:
    """Return the FLOPs of a run, or up to a checkpoint of it, with those of the run that it started from."""
    path = workdir_lib.at(location)
    of_checkpoint = path.parent.name == "checkpoints"
    workdir = path.parent.parent if of_checkpoint else path
    try:
        config = run_config.load(workdir)
    except ConfigError as error:
        raise ConfigError(
            f"{asked_by}: started from {location}, whose training counts too, and cannot be read: {error}"
        ) from error
    steps = int(path.name) if of_checkpoint else config_lib.steps(config, "training.duration")
    before = config.training.start_from
    return steps * counts.flops_per_step(config.model, config.data.sequence_length, config.data.batch_size) + (
        _flops_of_run(before, workdir) if before else 0.0
    )


def _stated(members: Sequence[Point]) -> list[tuple[str, published_lib.Stated]]:
    """Return the lines whose perplexity at this context the paper states, by name."""
    if members[0].about["training_context"] != published_lib.CONTEXT:
        return []
    found = {points_lib.model_label(p.about): published_lib.of(flat(p.config)) for p in members}
    return [(name, stated) for name, stated in found.items() if stated is not None]


def _draw_stated(axes: Axes, x: float, name: str, stated: published_lib.Stated) -> None:
    """Draw a perplexity that the paper states as a hollow point."""
    label = f"paper: {name}, {published_lib.WHERE}"
    axes.plot(x, stated.perplexity, label=label, **style.hollow_points(style.of_model(name)))


def perplexity_by_context(
    places: Sequence[str],
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    contexts: Sequence[int] | None = None,
    lines: str = "size",
    **which: Any,
) -> None:
    """Draw the perplexity of models at the context of their training against that context, and save the figure.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      contexts: training contexts to draw; None for all.
      lines: ``size`` for a line for each size and a panel for each kind of model; ``model`` for a line for each kind of
        model and a panel for each size, as in the paper.
      which: arguments of :func:`points.of_places` that choose evaluations.

    Raises:
      ConfigError: if runs were not evaluated or are not of one text, or if all have the same context.
    """
    style.check_output(*outputs)
    points = points_lib.of_places(places, split, contexts, **which)
    points_lib.check_same_text(points)
    known = sorted({point.about["training_context"] for point in points})
    if len(known) < 2:
        raise ConfigError(f"all runs were trained at {known[0]} tokens; expected runs of several contexts")

    by_size = dict(sorted(points_lib.grouped(points, lambda p: p.size).items()))
    names = {size: points_lib.size_name(members) for size, members in by_size.items()}
    of_sizes, of_kinds = dict(zip(by_size, style.SERIES, strict=False)), points_lib.styles(points)

    def kind(point: Point) -> str:
        return points_lib.model_label(point.about)

    def size(point: Point) -> tuple[int, int]:
        return point.size

    panel_of: Callable[[Point], Any] = kind if lines == "size" else size
    line_of: Callable[[Point], Any] = size if lines == "size" else kind
    ordered = [point for members in by_size.values() for point in members]
    by_panel = points_lib.grouped(ordered, panel_of)
    figure, panels = style.panels(len(by_panel))
    for axes, (panel, members) in zip(panels, by_panel.items(), strict=True):
        style.log_scale(axes.yaxis)
        for line, of_line in points_lib.grouped(members, line_of).items():
            look: Style = of_sizes[line] if lines == "size" else of_kinds[line]
            label = f"{names[line]} parameters" if lines == "size" else line
            pairs = points_lib.joined(of_line, lambda p: p.about["training_context"])
            axes.plot(*zip(*pairs, strict=True), label=label, **style.joined_points(look))
        points_lib.note_not_finite(axes, members)
        axes.set_title(style.wrapped(panel, 45) if lines == "size" else f"{names[panel]} parameters", fontsize=11)
        style.token_axis(axes.xaxis, known)
        axes.set_xlim(known[0] / 1.2, known[-1] * 1.2)
        axes.set_xlabel("context, tokens (log scale)")
        axes.set_ylabel("perplexity (log scale)")
        axes.grid(alpha=0.25)
    if lines == "size":  # the same limits, so that panels can be compared
        shown = [y for axes in panels for line in axes.get_lines() for y in np.asarray(line.get_ydata())]
        finite = [y for y in shown if np.isfinite(y)]
        for axes in panels if finite else []:
            axes.set_ylim(min(finite) / 1.05, max(finite) * 1.05)
    for axes in panels:
        style.log_ticks(axes.yaxis)
    figure.suptitle(f"Perplexity by context, {points_lib.data_name(points)}", fontsize=11)
    style.legend_below(figure)
    style.save(figure, *outputs)


def by_mini_batch(
    places: Sequence[str], outputs: Sequence[Path], *, split: str = "validation", published: bool = False, **which: Any
) -> None:
    """Draw perplexity and seconds per training step against b, side by side, and save the figure.

    The time is the median time of a training step; the paper shows the forward time of one layer.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      published: add the perplexity that the paper states.
      which: arguments of :func:`points.of_places` that choose evaluations.

    Raises:
      ConfigError: if runs were not evaluated, have no inner loop or are not of one text, or if the paper states nothing
        about them.
    """
    style.check_output(*outputs)
    points = points_lib.of_places(places, split, **which)
    points_lib.check_same_text(points)
    for point in points:
        if not pattern.learning_kinds(ConfigDict(point.config["model"])):
            raise ConfigError(f"{point.workdir}: {point.about['model']} has no mini-batches; expected a TTT layer")
    seconds = dict(zip((p.workdir for p in points), files.on_each(_seconds, points), strict=True))
    sizes = sorted({_b(point) for point in points})
    styles = points_lib.styles(points)
    figure, (left, right) = style.panels(2)
    style.log_scale(left.yaxis)
    for name, line in points_lib.grouped(points, lambda p: points_lib.model_label(p.about)).items():
        look = style.joined_points(styles[name])
        left.plot(*zip(*points_lib.joined(line, _b), strict=True), label=name, **look)
        timed = sorted(
            (b, s) for b, s in ((_b(p), seconds[p.workdir]) for p in line) if s is not None and math.isfinite(s)
        )
        if timed:
            right.plot(*zip(*timed, strict=True), label=name, **look)
    points_lib.note_not_finite(left, points)
    if published:
        stated = published_lib.TTT_LINEAR
        _draw_stated(left, stated.config[_MINI_BATCH], _line_of_ttt_linear(points), stated)
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


def _line_of_ttt_linear(points: Sequence[Point]) -> str:
    """Return the name of the line that the point of the paper belongs to."""
    stated = published_lib.TTT_LINEAR
    at_size = {_MINI_BATCH: stated.config[_MINI_BATCH]}  # b is the x axis: all other keys are those of the model
    for point in points:
        same = published_lib.of(flat(point.config) | at_size) == stated
        if same and point.about["training_context"] == published_lib.CONTEXT:
            return points_lib.model_label(point.about)
    raise ConfigError(
        f"--published: the paper states the perplexity of TTT-Linear (Mamba backbone) at {published_lib.CONTEXT} "
        "tokens, and of none of these runs"
    )


def _b(point: Point) -> int:
    return min(point.config["model"]["ttt"]["mini_batch"], point.about["training_context"])


def _seconds(point: Point) -> float | None:
    """Return the median over the run, which leaves out compiling and saving; None if no time was recorded."""
    return metric.of_run(point.workdir, "seconds_per_step").number
