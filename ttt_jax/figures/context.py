"""Perplexity against the context that models were trained at (Figure 16)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.errors import ConfigError
from ttt_jax.figures import points as points_lib
from ttt_jax.figures import style
from ttt_jax.figures.points import Point
from ttt_jax.figures.style import Style

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
