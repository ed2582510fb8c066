"""Draw the results of probes as heat maps, one for each run and task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt

from ttt_jax.evaluation.probes.cells import Cell
from ttt_jax.figures import style


class Panel(NamedTuple):
    """One heat map.

    Attributes:
      title: above the map.
      rows, columns: the labels of rows and columns.
      shares: [rows, columns], 0 to 1; NaN where there is no cell, infinity where the model gave NaN or infinity.
      trained: the first column whose context is longer than that of training; a line is drawn before it.
      row_title: the label of the y axis.
    """

    title: str
    rows: list[str]
    columns: list[str]
    shares: np.ndarray
    trained: int
    row_title: str


def panel(
    cells: Sequence[Cell], title: str, row: str, row_name: Callable[[Any], str], measure: str, training_context: int
) -> Panel:
    """Return cells as a heat map of ``measure``, a share, with a row for each value of ``row``."""
    contexts, rows = (sorted({cell[key] for cell in cells}) for key in ("context", row))
    shares = np.full((len(rows), len(contexts)), np.nan)
    for cell in cells:
        share = np.inf if cell[measure] is None else cell[measure]
        shares[rows.index(cell[row]), contexts.index(cell["context"])] = share
    columns = [f"{context // 1024}k" if context % 1024 == 0 else f"{context}" for context in contexts]
    longer = sum(context <= training_context for context in contexts)
    return Panel(
        f"{title}\ntrained on {training_context:,} tokens",
        [row_name(value) for value in rows],
        columns,
        shares,
        longer,
        row,
    )


def save(panels: Sequence[Sequence[Panel]], output: Path, what: str) -> None:
    """Draw rows of panels in one figure.

    Args:
      output: a path that ends in .png, .pdf or .svg.
      what: the label of the colour bar.

    Raises:
      ConfigError: for another kind of file.
    """
    style.check_output(output, option="--plot")
    across, down = max(map(len, panels)), len(panels)
    tallest = max(len(panel.rows) for line in panels for panel in line)
    widest = max(len(panel.columns) for line in panels for panel in line)
    size = across * (1.2 + 0.62 * widest) + 1.2, down * (1.1 + 0.36 * tallest) + 0.3
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    images = []
    for line, places in zip(panels, axes, strict=True):
        for place in places[len(line) :]:
            place.set_visible(False)
        for panel, place in zip(line, places, strict=False):
            images.append(_draw(panel, place))
    figure.colorbar(images[0], ax=axes, label=what, fraction=0.04, pad=0.02)
    style.save(figure, output)


def _draw(panel: Panel, axes):
    image = axes.imshow(np.ma.masked_invalid(panel.shares), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(panel.columns)), [style.literal(column) for column in panel.columns])
    axes.set_yticks(range(len(panel.rows)), [style.literal(row) for row in panel.rows])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel(style.literal(panel.row_title))
    axes.set_title(style.literal(panel.title), fontsize=9)
    for (y, x), share in np.ndenumerate(panel.shares):
        if np.isfinite(share):  # black on light colours, white on dark ones
            axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=8, color="k" if share > 0.6 else "w")
        elif np.isinf(share):
            axes.text(x, y, "not finite", ha="center", va="center", fontsize=6, color=style.ACCENT)
    if 0 < panel.trained < len(panel.columns):
        axes.axvline(panel.trained - 0.5, color="w", linewidth=2)
        axes.axvline(panel.trained - 0.5, color=style.ACCENT, linewidth=1.2, linestyle="--")
    return image
