"""Draw losses by token index: of several runs (Figure 2, right), and of the inner loop (Figures 4 and 14)."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from ttt_jax import finite as finite_lib
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import evaluations, inspections, result_files
from ttt_jax.evaluation.evaluations import Evaluation
from ttt_jax.figures import style
from ttt_jax.figures.points import model_label
from ttt_jax.figures.style import Style
from ttt_jax.storage import workdir as workdir_lib

_UNPREDICTABLE = 2  # first tokens of a document, which do not set the limits of the y axis
_WINDOW = 10  # timesteps that the paper averages over "for visual clarity"
_LABELS_ONLINE = (r"$\ell(W_0; x_t)$", r"$\ell(W_{t-1}; x_t)$", r"$\ell(W_t; x_t)$")  # b = 1, as in the paper's legend
_LABELS_MINI_BATCH = (
    r"$\ell(W_0; x_t)$",
    r"$\ell(W; x_t)$ before its mini-batch",
    r"$\ell(W; x_t)$ after its mini-batch",
)


def loss_by_position(
    workdirs: Sequence[str | os.PathLike],
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    context: int | None = None,
    against: str | os.PathLike | None = None,
    perplexity: bool = False,
    by_document: bool = False,
    **kind: Any,
) -> None:
    """Draw the loss by token index of several runs in one figure, and save it.

    Curves are smoothed over a constant ratio of positions; the band around each is the 95 % interval of its bins.

    Args:
      outputs: paths that end in .png, .pdf or .svg.
      context: of the evaluations; None for the longest that all runs have.
      against: a run; a second panel shows the paired difference of each other run to it, by bin, with 95 % intervals.
      perplexity: draw the exponential of the mean loss, on a log axis.
      by_document, kind: arguments of :func:`evaluations.read_all` that choose evaluations.

    Raises:
      ConfigError: if a run has no such evaluation, runs cannot be compared, or the kind of file is unknown.
    """
    style.check_output(*outputs)
    places = [*workdirs, *([] if against is None else [against])]
    read = evaluations.read_all(places, split, context, by_document=by_document, **kind)
    found = read[: len(workdirs)]
    for each in found[1:]:
        evaluations.check_paired(each, found[0])
    styles = style.distinct([model_label(each.about) for each in found])
    rows, height, ratios = (1, 4.4, [1.0]) if against is None else (2, 6.8, [1.6, 1.0])
    size = 7.2, height + 0.2 * len(found)  # inches; the legend stands below, a line for each run
    figure, panels = plt.subplots(rows, 1, figsize=size, height_ratios=ratios, layout="constrained", squeeze=False)
    first, last = panels.flat[0], panels.flat[-1]
    _draw_curves(first, found, styles, perplexity=perplexity, first=_UNPREDICTABLE if by_document else 0)
    if against is not None:
        _draw_differences(last, read[-1], found, styles)

    for axes in panels.flat:
        style.token_axis(axes.xaxis)
        axes.set_xlim(1, max(each.position[-1] for each in found))
        axes.grid(alpha=0.25, which="major")
    _mark_training_contexts(first, found)
    if perplexity:
        style.log_scale(first.yaxis)
        style.log_ticks(first.yaxis)
    first.set_ylabel("perplexity (log scale)" if perplexity else "loss (nats per token)")
    last.set_xlabel(f"token index in the {'document' if by_document else 'sequence'} (log scale)")
    about = found[0].about
    what = "Perplexity" if perplexity else "Loss"
    title = f"{what} by token index, {about['source']}, {evaluations.read_of(about)}"
    first.set_title(style.literal(title), fontsize=11, wrap=True)
    style.legend_below(figure)
    style.save(figure, *outputs)


def smooth(position: np.ndarray, loss: np.ndarray, ratio: float = 1.15, tokens: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of the loss over positions from ``i / ratio`` to ``i * ratio``, a constant width on a log axis.

    Args:
      position, loss: [T].
      tokens: [T], the number of tokens at each position; positions with none are left out. None: all have some.

    Returns:
      [T]; NaN where no position has tokens, and where the loss of one of them is not finite.
    """
    valid = np.ones(len(loss), bool) if tokens is None else tokens > 0
    finite = np.isfinite(loss)
    low = np.searchsorted(position, position / ratio, side="left")
    high = np.searchsorted(position, position * ratio, side="right")

    def within(values: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return total[high] - total[low]

    with np.errstate(invalid="ignore"):
        mean = within(np.where(valid & finite, loss, 0.0)) / within(valid)
    return np.where(within(valid & ~finite) > 0, np.nan, mean)


def _draw_curves(axes: Axes, found: Sequence[Evaluation], styles: Sequence[Style], *, perplexity: bool, first: int):
    of_loss: Callable = _exp if perplexity else lambda loss: loss
    means = [_mean(each.about, perplexity) for each in found]
    labels = [style.literal(f"{name}: {mean}") for name, mean in zip(_names(found), means, strict=True)]
    for each, (color, line, _), label in zip(found, styles, labels, strict=True):
        # There may be a hundred thousand points: pixels also in vector formats, and fainter for longer contexts.
        faint = min(0.12, 0.12 * math.sqrt(2048 / len(each.position)))
        points: dict[str, Any] = {"color": color, "alpha": faint, "markersize": 3, "markeredgewidth": 0, "zorder": 1}
        axes.plot(each.position, of_loss(each.loss), ".", rasterized=True, **points)
        curve = smooth(each.position, each.loss, tokens=each.count)
        axes.plot(each.position, of_loss(curve), color=color, linestyle=line, linewidth=1.8, label=label)
        low, high = of_loss(each.bin_low), of_loss(each.bin_high)
        axes.fill_between(_middles(each), low, high, color=color, alpha=0.15, linewidth=0, zorder=1.5)
    low, high = _limits(found, first)
    axes.set_ylim(of_loss(low), of_loss(min(high, 600.0) if perplexity else high))  # e^710 is infinite


def _exp(loss: np.ndarray) -> np.ndarray:
    """Return e^loss, infinity where it overflows."""
    with np.errstate(over="ignore"):
        return np.exp(loss)


def _mean(about: dict[str, Any], perplexity: bool) -> str:
    """Return the mean of a run in words, or the number of its tokens that are not finite."""
    if problem := evaluations.not_finite(about):
        return f"{finite_lib.NOT_FINITE}, {problem}"
    if perplexity:
        return f"perplexity {finite_lib.format_number(about['perplexity'], '.2f')}"
    return f"mean {about['loss']:.3f}"


def _draw_differences(axes: Axes, reference: Evaluation, found: Sequence[Evaluation], styles: Sequence[Style]):
    axes.axhline(0, color="0.3", linewidth=0.8)
    for each, (color, line, marker) in zip(found, styles, strict=True):
        if each.about == reference.about:
            continue
        bins = evaluations.paired_difference(each, reference).bins
        at = _middles(each)
        axes.plot(at, bins.mean, color=color, linestyle=line, marker=marker, markersize=4, linewidth=1.2)
        axes.fill_between(at, bins.low, bins.high, color=color, alpha=0.15, linewidth=0)
    axes.set_ylabel("difference in loss\n(nats per token)")
    axes.set_title(style.literal(f"difference to {_names([reference])[0]}; paired, 95 % intervals"), fontsize=10)


def _middles(evaluation: Evaluation) -> np.ndarray:
    """Return the geometric middles of the bins, [K], their places on a log axis."""
    return np.sqrt(evaluation.bin_first * evaluation.bin_last.astype(float))


def _mark_training_contexts(axes: Axes, found: Sequence[Evaluation]) -> None:
    lengths = {each.about["training_context"] for each in found}
    for length in sorted(length for length in lengths if length < found[0].position[-1]):
        axes.axvline(length, color="0.5", linewidth=0.8, linestyle=":")
        where: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "bottom"}
        axes.text(length * 0.96, 0.02, f"trained on {length:,}", **where, **style.NOTE)


def _names(found: Sequence[Evaluation]) -> list[str]:
    """Return each model in words, with the name of the run if two would be the same."""
    names = [f"{model_label(e.about)}, {style.millions(e.about['parameters'])} parameters" for e in found]
    return [
        f"{name}, {e.about['workdir']}" if names.count(name) > 1 else name for name, e in zip(names, found, strict=True)
    ]


def _limits(found: Sequence[Evaluation], first: int) -> tuple[float, float]:
    """Return the limits of all smoothed curves from a position on, and of most raw points."""
    raw = np.concatenate([e.loss[np.isfinite(e.loss)] for e in found])
    curves = np.concatenate([smooth(e.position, e.loss, tokens=e.count)[first:] for e in found])
    if not np.isfinite(curves).any():
        return 0.0, 1.0
    low = min(np.nanmin(curves), np.percentile(raw, 0.5))
    high = max(np.nanmax(curves), np.percentile(raw, 99.5))
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def inner_loss(
    workdir: str | os.PathLike,
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    context: int | None = None,
    layers: Sequence[int] | None = None,
    window: int = _WINDOW,
    windows: int | None = None,
) -> None:
    """Draw the loss of the inner loop by token index, a panel for each layer, and save the figure.

    Each panel has the loss of a token at W0, at the weights before its mini-batch, and at the weights after it.

    Args:
      outputs: paths that end in .png, .pdf or .svg.
      context: of the inspection; None for the longest.
      layers: numbers of blocks that learn, from 0; None for all of them.
      window: the number of positions to average over.
      windows: the number of windows of the inspection, to choose between several.

    Raises:
      ConfigError: if the run was not inspected, or has no such layer.
    """
    style.check_output(*outputs)
    found = inspections.read(workdir, split, context, windows=windows)
    result_files.check(found.about, workdir_lib.at(workdir) / "inspect", ("model", "source", "windows", "context"))
    chosen = found.blocks if layers is None else layers
    for layer in chosen:
        if layer not in found.blocks:
            raise ConfigError(f"--layers {layer}: no layer of this number learns; expected {_listed(found.blocks)}")
    if not 1 <= window <= len(found.position):
        raise ConfigError(f"--window {window}: expected 1 to {len(found.position)}, the context")
    figure, panels = style.panels(
        len(chosen), columns=3 if len(chosen) in (3, 5, 6, 9) else min(4, len(chosen)), width=3.4, height=2.5
    )
    for axes, layer in zip(panels, chosen, strict=True):
        row = found.blocks.index(layer)
        labels = _LABELS_ONLINE if found.position_eta.shape[1] == 1 else _LABELS_MINI_BATCH
        for (name, look), label in zip(style.INNER_LOSSES.items(), labels, strict=True):
            position, curve = (sliding_mean(x, window) for x in (found.position, getattr(found, name)[row]))
            axes.plot(position, curve, color=look.color, linestyle=look.line, linewidth=1.3, label=label)
        bad = sum(int((~np.isfinite(getattr(found, name)[row])).sum()) for name in style.INNER_LOSSES)
        axes.set_title(f"layer {layer}" + (f": {bad:,} losses {finite_lib.NOT_FINITE}" if bad else ""), fontsize=10)
        axes.grid(alpha=0.25)
        axes.margins(x=0.02)
        grid = axes.get_subplotspec()
        if grid is None or layer in list(chosen)[-grid.get_gridspec().ncols :]:
            axes.set_xlabel("token index t")
        if grid is None or grid.is_first_col():
            axes.set_ylabel("inner loss")
    about = found.about
    title = (
        f"Loss of the inner loop, {about['model']}, {about['source']}, {about['windows']:,} windows of "
        f"{about['context']:,} tokens; mean over {window} positions"
    )
    figure.suptitle(style.literal(title), fontsize=10, wrap=True)
    style.legend_below(figure)
    style.save(figure, *outputs)


def _listed(blocks: list[int]) -> str:
    if len(blocks) > 1 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"{blocks[0]} to {blocks[-1]}"
    return ", ".join(map(str, blocks))


def sliding_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the means of ``window`` neighbours, [T + 1 - window]; NaN where one of them is not finite."""
    values = np.asarray(values, np.float64)
    bad = ~np.isfinite(values)

    def within(numbers: np.ndarray) -> np.ndarray:
        total = np.cumsum(np.concatenate([[0.0], numbers]))
        return total[window:] - total[:-window]

    return np.where(within(bad) > 0, np.nan, within(np.where(bad, 0.0, values)) / window)
