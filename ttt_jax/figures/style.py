"""How pictures look: one colour, line and marker for each kind of model in all of them, axes, and files."""

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
from ttt_jax.storage.workdir import explained

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
FINETUNED = ", fine-tuned"  # follows the model in words, of a run that started from another run's parameters
NOTE: dict[str, Any] = {"fontsize": 8, "color": "0.4"}  # of remarks within a picture


# Okabe and Ito's palette, and greys.
_MODELS = {
    **{label: look for mixer in MIXERS.values() for label, look in mixer.styles.items()},
    "Mamba": Style("#009E73", ":", "*"),  # of the paper's numbers
}
_OTHERS = (
    Style("#009E73", ":", "h"),
    Style("#CC79A7", (0, (1, 2)), "<"),
    Style("#8C6D1F", (0, (8, 2)), ">"),
    Style("#56B4E9", (0, (2, 2)), "p"),
    Style("#882255", (0, (4, 1, 1, 1, 1, 1)), "d"),
)

# Of lines that are not models: values of a key, sizes.
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


def of(model: str) -> Style:
    """The style of a model, given in words (:func:`ttt_jax.models.pattern.describe`); of one that has none, the first
    that no model has."""
    return _MODELS.get(model, _OTHERS[0])


def distinct(models: Sequence[str]) -> list[Style]:
    """A style for each line of a picture: that of its model, and another one for the second line of a model."""
    others, used, found = itertools.cycle(_OTHERS), set(), []
    for model in models:
        found.append(next(others) if model in used or model not in _MODELS else _MODELS[model])
        used.add(model)
    return found


def literal(text: str) -> str:
    """Return a text that Matplotlib shows as it is: a dollar sign begins no formula, and no underscore hides a label.

    Names and values of users go through this. Labels that begin with an underscore are left out of legends; a space of
    no width before it keeps them. Bytes of file names that are no text are spelled out.
    """
    escaped = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f"\u200b{escaped}" if escaped.startswith("_") else escaped


def panels(
    count: int, columns: int | None = None, width: float = 4.2, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """A figure with panels of one size, at most so many beside each other."""
    columns = min(count, columns or (2 if count == 4 else 3))
    rows = -(-count // columns)
    size = max(width * columns, 5.6), height * rows + 1.0  # inches; the legend stands below
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def legend_below(figure: Figure) -> None:
    """One legend for all panels: each label once, in the order in which they came, in as many columns as fit. Labels
    that are too long for one go on in further lines, for which the picture grows."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    # A dash pattern is seen only where there is room for it.
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
    """Return a text in lines of so many characters, where it is longer."""
    return text if len(text) <= characters else textwrap.fill(text, characters, break_long_words=False)


def tokens(count: float) -> str:
    """A number of tokens: 512, 2k."""
    return f"{count:.0f}" if count < 1024 or count % 1024 else f"{count / 1024:.0f}k"


def millions(parameters: float) -> str:
    """A number of parameters: 32 k, 0.57 M, 125 M, 1.3 B."""
    if parameters < 9.95e4:
        return f"{parameters / 1e3:.2g} k"
    if parameters >= 9.995e8:
        return f"{parameters / 1e9:.2g} B"
    return f"{parameters / 1e6:.2g} M" if parameters < 9.95e6 else f"{parameters / 1e6:,.0f} M"


def token_axis(axis: Axis, at: Sequence[int] | None = None) -> None:
    """Makes an axis one of tokens, by powers of two.

    Args:
      at: where ticks stand; by default at powers of two.
    """
    axis.axes.set_xscale("log", base=2)
    axis.set_major_locator(ticker.LogLocator(base=2, numticks=20) if at is None else ticker.FixedLocator(sorted(at)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: tokens(x)))


def log_ticks(axis: Axis) -> None:
    """Ticks of a log axis, also where it spans less than a factor of ten. To be called when all is drawn."""
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
    """Raises :class:`ConfigError` for a kind of file that is not written."""
    for output in outputs:
        if output.suffix not in accepted:
            listed = f"{', '.join(accepted[:-1])} or {accepted[-1]}"
            raise ConfigError(f"{option} {output}: expected a name that ends in {listed}")


def save(figure: Figure, *outputs: Path) -> None:
    """Writes a picture as .png, .pdf or .svg, by the names of the files, and closes it."""
    for output in outputs:
        check_output(output)
        content = io.BytesIO()
        figure.savefig(content, format=output.suffix[1:], dpi=160)
        output.parent.mkdir(parents=True, exist_ok=True)
        with explained(output):
            output.write_bytes(content.getvalue())  # an earlier picture is lost only to a whole one
    plt.close(figure)


def _number(x: float) -> str:
    """12, 0.05; 2 x 10^18."""
    if 1e-3 <= x < 1e5:
        return f"{x:g}"
    exponent = math.floor(math.log10(x) + 1e-9)
    factor = f"{x / 10**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if factor == "1" else rf"${factor} \times 10^{{{exponent}}}$"
