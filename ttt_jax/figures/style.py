"""Set the look of all figures: a colour, line and marker for each kind of model; axes, legends and files.

The styles of models are those of their mixers, in all figures.
"""

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ttt_jax.errors import ConfigError
from ttt_jax.mixers import MIXERS
from ttt_jax.mixers.mixer import Style
from ttt_jax.storage.writing import write_output

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
FINETUNED = ", fine-tuned"  # added to the name of a model that started from the parameters of another run
NOTE: dict[str, Any] = {"fontsize": 8, "color": "0.4"}  # remarks in a figure
ACCENT = "#D55E00"  # marks on heat maps

# Okabe and Ito's palette, and greys.
_MODELS = {
    **{label: look for mixer in MIXERS.values() for label, look in mixer.styles.items()},
    "Mamba": Style("#009E73", ":", "*"),  # in the paper only
}
_OTHERS = (
    Style("#009E73", ":", "h"),
    Style("#CC79A7", (0, (1, 2)), "<"),
    Style("#8C6D1F", (0, (8, 2)), ">"),
    Style("#56B4E9", (0, (2, 2)), "p"),
    Style("#882255", (0, (4, 1, 1, 1, 1, 1)), "d"),
)

# Lines that are not models: values of a key, sizes.
SERIES = (
    Style("#0072B2", "-", "o"),
    Style("#D55E00", "--", "s"),
    Style("#000000", "-.", "^"),
    Style("#009E73", ":", "D"),
    Style("#CC79A7", (0, (5, 1)), "v"),
    Style("#E69F00", (0, (3, 1, 1, 1)), "P"),
    Style("#56B4E9", (0, (8, 2)), "X"),
    Style("#8C6D1F", (0, (1, 1)), "*"),
)


# The loss of the inner loop, by the weights at which it is taken.
INNER_LOSSES = {
    "loss_at_w0": Style("#0072B2", "-", ""),
    "loss_before": Style("#E69F00", (0, (4, 1)), ""),
    "loss_after": Style("#009E73", (0, (1, 1)), ""),
}


def joined_points(look: Style) -> dict[str, Any]:
    """Return the keywords of ``Axes.plot`` for points joined by a line."""
    return {"color": look.color, "linestyle": look.line, "marker": look.marker, "markersize": 5, "linewidth": 1.8}


def hollow_points(look: Style) -> dict[str, Any]:
    """Return the keywords of ``Axes.plot`` for points that the paper states."""
    return {"color": look.color, "linestyle": "none", "marker": look.marker, "markersize": 9, "mfc": "white"}


def of_model(model: str) -> Style:
    """Return the style of a model by its description (:func:`ttt_jax.models.pattern.describe`).

    Descriptions without a style of their own get the first style that no model has.
    """
    return _MODELS.get(model, _OTHERS[0])


def distinct(models: Sequence[str]) -> list[Style]:
    """Return a style for each line of a figure: that of its model, and another for further lines of the same model."""
    others, used, found = itertools.cycle(_OTHERS), set(), []
    for model in models:
        found.append(next(others) if model in used or model not in _MODELS else _MODELS[model])
        used.add(model)
    return found


def literal(text: str) -> str:
    """Return a text that Matplotlib shows as it is; names and values of users must go through this function.

    Dollar signs are escaped, as they begin formulas. A space of zero width before a leading underscore keeps the label
    in legends. Bytes of file names that are not text are spelled out.
    """
    escaped = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def panels(
    count: int, columns: int | None = None, width: float = 4.2, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of one size, in rows of at most ``columns``."""
    columns = min(count, columns or (2 if count == 4 else 3))
    rows = -(-count // columns)
    size = max(width * columns, 5.6), height * rows + 1.0  # inches; the legend stands below
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def legend_below(figure: Figure) -> None:
    """Draw one legend for all panels below them, each label once, in as many columns as fit.

    Labels that are too long for one column are wrapped, and the figure grows accordingly.
    """
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # Long handles, so that dash patterns can be seen.
    look: dict[str, Any] = {"loc": "outside lower center", "fontsize": 9, "edgecolor": "none", "handlelength": 3.6}
    longest = max(map(len, handles), default=0)
    layouts = [(columns, longest) for columns in range(min(4, len(handles)), 0, -1)]
    layouts += [(1, characters) for characters in range(longest - 4, 40, -4)]
    for columns, characters in layouts:
        labels = [wrapped(label, characters) for label in handles]
        legend = figure.legend(list(handles.values()), labels, ncols=columns, **look)
        if legend.get_window_extent().width < figure.bbox.width or (columns, characters) == layouts[-1]:
            more = sum(label.count("\n") for label in labels)
            figure.set_figheight(figure.get_figheight() + 0.17 * more)
            break
        legend.remove()


def wrapped(text: str, characters: int) -> str:
    """Wrap a text that is longer than ``characters``."""
    return text if len(text) <= characters else textwrap.fill(text, characters, break_long_words=False)


def tokens(count: float) -> str:
    """Format a number of tokens: 512, 2k."""
    return f"{count:.0f}" if count < 1024 or count % 1024 else f"{count / 1024:.0f}k"


def millions(parameters: float) -> str:
    """Format a number of parameters: 32 k, 0.57 M, 125 M, 1.3 B."""
    if parameters < 9.95e4:
        return f"{parameters / 1e3:.2g} k"
    if parameters >= 9.995e8:
        return f"{parameters / 1e9:.2g} B"
    return f"{parameters / 1e6:.2g} M" if parameters < 9.95e6 else f"{parameters / 1e6:,.0f} M"


def token_axis(axis: Axis, at: Sequence[int] | None = None) -> None:
    """Scale an axis of tokens by powers of two.

    Args:
      at: the ticks; by default, powers of two.
    """
    axis.axes.set_xscale("log", base=2)
    axis.set_major_locator(ticker.LogLocator(base=2, numticks=20) if at is None else ticker.FixedLocator(sorted(at)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: tokens(x)))


class _Decades(ticker.LogLocator):
    """A locator for which numbers that differ by rounding are one, so that the axis spans the decades around it."""

    def nonsingular(self, vmin: float, vmax: float) -> tuple[float, float]:
        if 0 < vmin <= vmax < vmin * (1 + 1e-9):
            vmin = vmax = float(f"{vmin:.9g}")  # Matplotlib finds no decade below and above 10.000000000000002
        return super().nonsingular(vmin, vmax)


def log_scale(axis: Axis) -> None:
    """Scale an axis by powers of ten; :func:`log_ticks` sets its ticks after the data is drawn."""
    axes = axis.axes
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(_Decades())


def log_ticks(axis: Axis) -> None:
    """Set the ticks of a log axis, also if it spans less than a factor of ten. Call this after drawing the data."""
    low, high = sorted(axis.get_view_interval())
    if not (0 < low < high < math.inf):  # nothing is drawn
        return
    decades = math.log10(high) - math.log10(low)
    if decades < 0.7:
        axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.8 else (1.0,), numticks=9))
    axis.set_minor_locator(ticker.NullLocator() if decades < 1.8 else ticker.LogLocator(subs="auto", numticks=9))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: _number(x)))


def check_output(*outputs: Path, option: str = "--output", accepted: Sequence[str] = SUFFIXES) -> None:
    """Raise :class:`ConfigError` for a kind of file that cannot be written."""
    for output in outputs:
        if output.suffix not in accepted:
            listed = f"{', '.join(accepted[:-1])} or {accepted[-1]}"
            raise ConfigError(f"{option} {output}: expected a name that ends in {listed}")


def save(figure: Figure, *outputs: Path) -> None:
    """Write a figure as .png, .pdf or .svg, by the suffixes of the files, and close it."""
    for output in outputs:
        check_output(output)
        content = io.BytesIO()
        figure.savefig(content, format=output.suffix[1:], dpi=160)
        write_output(output, content.getvalue())
    plt.close(figure)


def _number(x: float) -> str:
    """Format a number for an axis: 12, 0.05, 2 x 10^18."""
    if 1e-3 <= x < 1e5:
        return f"{x:g}"
    exponent = math.floor(math.log10(x) + 1e-9)
    factor = f"{x / 10**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if factor == "1" else rf"${factor} \times 10^{{{exponent}}}$"
