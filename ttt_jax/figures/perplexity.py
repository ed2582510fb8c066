"""Perplexity against training FLOPs, a line per kind of model through its sizes (Figures 2 left, 10, 11 and 15)."""

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
from ttt_jax.models import pattern
from ttt_jax.settings import flat
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.sweep import files, metric
from ttt_jax.training import run_config


def perplexity_by_flops(
    places: Sequence[str],
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    contexts: Sequence[int] | None = None,
    published: bool = False,
    **which: Any,
) -> None:
    """Draw a panel for each training context, and saves the picture.

    Training FLOPs are those that the model needs, by its config (:mod:`ttt_jax.models.counts`), to the step that was
    evaluated; of a fine-tuned one, with those of the run that it started from. Points are joined, as in the paper,
    which found no line that would fit them.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      contexts: only these; None is all.
      published: with the perplexities that the paper states.

    Raises:
      ConfigError: for runs that were not evaluated, are not of one text, or that the paper states nothing about.
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
        axes.set_xscale("log")
        axes.set_yscale("log")
        for name, line in points_lib.grouped(members, lambda p: points_lib.line_of(p.about)).items():
            pairs = points_lib.joined(line, _training_flops)
            axes.plot(*zip(*pairs, strict=True), label=name, **styles[name].of_points)
        points_lib.note_not_finite(axes, members)
        if published:
            _draw_stated_by_flops(axes, members)
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
    """Of all steps of a run, or to the checkpoint that ``location`` is, and of what it started from itself."""
    from ttt_jax.models import counts

    place = workdir_lib.at(location)
    of_checkpoint = place.parent.name == "checkpoints"
    workdir = place.parent.parent if of_checkpoint else place
    try:
        config = run_config.load(workdir)
    except ConfigError as error:
        raise ConfigError(
            f"{asked_by}: started from {location}, whose training counts too, and cannot be read: {error}"
        ) from error
    steps = int(place.name) if of_checkpoint else config_lib.steps(config, "training.duration")
    before = config.training.start_from
    return steps * counts.flops_per_step(config.model, config.data.sequence_length, config.data.batch_size) + (
        _flops_of_run(before, workdir) if before else 0.0
    )


def _stated(members: Sequence[Point]) -> list[tuple[str, published_lib.Stated]]:
    """Names of lines that the paper states a perplexity of, at this context."""
    if members[0].about["training_context"] != published_lib.CONTEXT:
        return []
    found = {points_lib.line_of(p.about): published_lib.of(flat(p.config)) for p in members}
    return [(name, stated) for name, stated in found.items() if stated is not None]


def _draw_stated_by_flops(axes: Axes, members: Sequence[Point]) -> None:
    """Hollow points, at the training FLOPs of the paper's recipe by the count that is used here."""
    for name, stated in _stated(members):
        label = f"paper: {name}, {published_lib.WHERE}"
        axes.plot(published_lib.training_flops(stated), stated.perplexity, label=label, **style.of(name).hollow)


LINES = ("size", "model")


def perplexity_by_context(
    places: Sequence[str],
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    contexts: Sequence[int] | None = None,
    lines: str = "size",
    **which: Any,
) -> None:
    """Draw the perplexity of models at the context of their training, and saves the picture.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      contexts: only these; None is all.
      lines: ``size``: a line for each size, a panel for each kind of model; ``model``: the other way round, as in the
        paper.
      which: of the evaluations, as :func:`points.of_places` takes it.

    Raises:
      ConfigError: for runs that were not evaluated, or not on one text; where all have one context.
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
        return points_lib.line_of(point.about)

    def size(point: Point) -> tuple[int, int]:
        return point.size

    panel_of: Callable[[Point], Any] = kind if lines == "size" else size
    line_of: Callable[[Point], Any] = size if lines == "size" else kind
    ordered = [point for members in by_size.values() for point in members]
    by_panel = points_lib.grouped(ordered, panel_of)
    figure, panels = style.panels(len(by_panel))
    for axes, (panel, members) in zip(panels, by_panel.items(), strict=True):
        axes.set_yscale("log")
        for line, of_line in points_lib.grouped(members, line_of).items():
            look: Style = of_sizes[line] if lines == "size" else of_kinds[line]
            label = f"{names[line]} parameters" if lines == "size" else line
            pairs = points_lib.joined(of_line, lambda p: p.about["training_context"])
            axes.plot(*zip(*pairs, strict=True), label=label, **look.of_points)
        points_lib.note_not_finite(axes, members)
        axes.set_title(style.wrapped(panel, 45) if lines == "size" else f"{names[panel]} parameters", fontsize=11)
        style.token_axis(axes.xaxis, known)
        axes.set_xlim(known[0] / 1.2, known[-1] * 1.2)
        axes.set_xlabel("context, tokens (log scale)")
        axes.set_ylabel("perplexity (log scale)")
        axes.grid(alpha=0.25)
    if lines == "size":  # panels can be compared
        shown = [y for axes in panels for line in axes.get_lines() for y in np.asarray(line.get_ydata())]
        finite = [y for y in shown if np.isfinite(y)]
        for axes in panels if finite else []:
            axes.set_ylim(min(finite) / 1.05, max(finite) * 1.05)
    for axes in panels:
        style.log_ticks(axes.yaxis)
    figure.suptitle(f"Perplexity by context, {points_lib.data_name(points)}", fontsize=11)
    style.legend_below(figure)
    style.save(figure, *outputs)


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
        _draw_stated_by_mini_batch(left, points)
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


def _draw_stated_by_mini_batch(axes: Axes, points: Sequence[Point]) -> None:
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
