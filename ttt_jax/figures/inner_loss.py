"""The loss of the inner loop by token index, layer by layer (Figures 4 and 14)."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttt_jax import finite
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import inner_loop_files, result_files
from ttt_jax.figures import style
from ttt_jax.figures.style import Style
from ttt_jax.storage import workdir as workdir_lib

_WINDOW = 10  # timesteps that the paper averages over "for visual clarity"
_STYLES = {  # of the learner's loss, by when it is taken
    "loss_at_w0": Style("#0072B2", "-", ""),
    "loss_before": Style("#E69F00", (0, (4, 1)), ""),
    "loss_after": Style("#009E73", (0, (1, 1)), ""),
}
_ONLINE = (r"$\ell(W_0; x_t)$", r"$\ell(W_{t-1}; x_t)$", r"$\ell(W_t; x_t)$")  # b = 1, as in the paper's legend
_MINI_BATCH = (r"$\ell(W_0; x_t)$", r"$\ell(W; x_t)$ before its mini-batch", r"$\ell(W; x_t)$ after its mini-batch")


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
    """Draw three curves for each layer, in a panel of its own, and saves the picture: the loss of a token at W0, at
    the weights before its mini-batch, and after it.

    Args:
      outputs: paths that end in .png, .pdf or .svg.
      context: of the inspection; None is the longest.
      layers: blocks of the model that learn, from 0; None is all of them.
      window: positions that are averaged over.
      windows: of the inspection, where there are several.

    Raises:
      ConfigError: where the run was not inspected, or has no such layer.
    """
    style.check_output(*outputs)
    found = inner_loop_files.read(workdir, split, context, windows=windows)
    result_files.check(found.about, workdir_lib.at(workdir) / "inspect", ("model", "source", "windows", "context"))
    chosen = found.blocks if layers is None else layers
    for layer in chosen:
        if layer not in found.blocks:
            raise ConfigError(f"--layers {layer}: no such layer that learns; expected {_listed(found.blocks)}")
    if not 1 <= window <= len(found.position):
        raise ConfigError(f"--window {window}: expected 1 to {len(found.position)}, the context")
    figure, panels = style.panels(
        len(chosen), columns=3 if len(chosen) in (3, 5, 6, 9) else min(4, len(chosen)), width=3.4, height=2.5
    )
    for axes, layer in zip(panels, chosen, strict=True):
        row = found.blocks.index(layer)
        labels = _ONLINE if found.position_eta.shape[1] == 1 else _MINI_BATCH
        for (name, look), label in zip(_STYLES.items(), labels, strict=True):
            position, curve = (sliding_mean(x, window) for x in (found.position, getattr(found, name)[row]))
            axes.plot(position, curve, color=look.color, linestyle=look.line, linewidth=1.3, label=label)
        bad = sum(int((~np.isfinite(getattr(found, name)[row])).sum()) for name in _STYLES)
        axes.set_title(f"layer {layer}" + (f": {bad:,} losses {finite.NOT_FINITE}" if bad else ""), fontsize=10)
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
    """Return the mean over ``window`` neighbours: of T values, T + 1 - window; NaN where one of them is not finite."""
    values = np.asarray(values, np.float64)
    bad = ~np.isfinite(values)

    def within(numbers: np.ndarray) -> np.ndarray:
        total = np.cumsum(np.concatenate([[0.0], numbers]))
        return total[window:] - total[:-window]

    return np.where(within(bad) > 0, np.nan, within(np.where(bad, 0.0, values)) / window)
