"""Pictures of evaluations."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from ttt_jax import workdir as workdir_lib
from ttt_jax.config import ConfigError

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator

# One colour and line style per kind of model, told apart without colour too (Okabe and Ito's palette).
_STYLES = {
    "TTT-Linear (Mamba backbone)": ("#0072B2", "-"),
    "TTT-MLP (Mamba backbone)": ("#D55E00", "--"),
    "Transformer": ("#000000", "-."),
    "TTT-Linear (Transformer backbone)": ("#56B4E9", (0, (5, 1))),
    "TTT-MLP (Transformer backbone)": ("#E69F00", (0, (3, 1, 1, 1))),
}
_OTHER_STYLES = [("#009E73", ":"), ("#CC79A7", (0, (1, 1))), ("#8C6D1F", (0, (8, 2)))]
_SURPRISES = 2  # first tokens of a document, of which nobody can know anything
_NOTE: dict[str, Any] = {"ha": "right", "va": "bottom", "fontsize": 8, "color": "0.4"}


class Evaluation(NamedTuple):
    """A saved evaluation of one run."""

    about: dict
    position: np.ndarray  # [T], from 1
    loss: np.ndarray  # [T]
    standard_error: np.ndarray  # [T]


def read(workdir: str | os.PathLike, split: str, context: int | None, by_document: bool = False) -> Evaluation:
    """The evaluation of a run on a split; of the longest context that was evaluated, where none is given.

    Raises:
      ConfigError: where there is none.
    """
    workdir = workdir_lib.at(workdir)
    kind = f"{split}-documents-" if by_document else f"{split}-"
    with workdir_lib.explained(workdir):
        files = {p.stem.removeprefix(kind): p for p in (workdir / "eval").glob(f"{kind}*.npz")}
    found = {int(name): path for name, path in files.items() if name.isdecimal()}
    chosen = max(found, default=None) if context is None else context
    if chosen is None or chosen not in found:
        length = "" if context is None else f" with context {context}"
        raise ConfigError(
            f"{workdir}: no evaluation of the {split} split{length}; run: "
            f"ttt eval --workdir {workdir} --split {split} --context {context or 2048}"
            + (" --by-document" if by_document else "")
        )
    with workdir_lib.explained(workdir):
        about = json.loads(found[chosen].with_suffix(".json").read_text())
        content = io.BytesIO(found[chosen].read_bytes())
    with np.load(content, allow_pickle=False) as file:
        return Evaluation(about, file["position"], file["loss"], file["standard_error"])


def smooth(position: np.ndarray, loss: np.ndarray, ratio: float = 1.15) -> np.ndarray:
    """Mean of the loss over positions from ``i / ratio`` to ``i * ratio``: a constant width on a log axis. [T]"""
    valid = np.isfinite(loss)
    total = np.concatenate([[0.0], np.cumsum(np.where(valid, loss, 0.0))])
    count = np.concatenate([[0], np.cumsum(valid)])
    low = np.searchsorted(position, position / ratio, side="left")
    high = np.searchsorted(position, position * ratio, side="right")
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def loss_by_position(
    workdirs: Sequence[str | os.PathLike],
    output: Path,
    *,
    split: str = "validation",
    context: int | None = None,
    by_document: bool = False,
) -> None:
    """Draws the loss by token index of several runs on one figure, and saves it.

    Args:
      output: a path that ends in .png, .pdf or .svg.

    Raises:
      ConfigError: for a run without such an evaluation, or an unknown kind of file.
    """
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--output {output}: expected a name that ends in .png, .pdf or .svg")
    evaluations = [read(workdir, split, context, by_document) for workdir in workdirs]
    _check_comparable(workdirs, evaluations)

    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    others = iter(_OTHER_STYLES * len(evaluations))
    used = set()
    for evaluation, label in zip(evaluations, _labels(evaluations), strict=True):
        model = evaluation.about["model"]
        color, line = next(others) if model in used or model not in _STYLES else _STYLES[model]
        used.add(model)
        axes.plot(evaluation.position, evaluation.loss, ".", color=color, alpha=0.12, markersize=3, markeredgewidth=0)
        curve = smooth(evaluation.position, evaluation.loss)
        axes.plot(evaluation.position, curve, color=color, linestyle=line, linewidth=1.8, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}" if x < 1024 else f"{x / 1024:.0f}k"))
    axes.set_xlim(1, max(e.position[-1] for e in evaluations))
    axes.set_ylim(*_limits(evaluations, first=_SURPRISES if by_document else 0))
    for length in {e.about["training_context"] for e in evaluations if e.about["training_context"] < e.position[-1]}:
        axes.axvline(length, color="0.5", linewidth=0.8, linestyle=":")
        axes.text(length * 0.96, 0.02, f"trained on {length:,}", transform=axes.get_xaxis_transform(), **_NOTE)
    axes.set_xlabel(f"token index in the {'document' if by_document else 'sequence'} (log scale)")
    axes.set_ylabel("loss (nats per token)")
    about = evaluations[0].about
    windows = (
        f"{about['windows']:,} {about.get('of', 'windows')} of {'up to ' * by_document}{about['context']:,} tokens"
    )
    axes.set_title(f"Loss by token index, {about['source']}, {windows}", fontsize=11)
    axes.grid(alpha=0.25, which="major")
    axes.legend(loc="upper right", framealpha=0.8, edgecolor="none")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)
    plt.close(figure)


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Each model in words, with its mean loss; the name of the run too where two would read the same."""
    names = [f"{e.about['model']}, {_millions(e.about['parameters'])} parameters" for e in evaluations]
    names = [
        f"{name}, {e.about['workdir']}" if names.count(name) > 1 else name
        for name, e in zip(names, evaluations, strict=True)
    ]
    return [f"{name}: mean {e.about['loss']:.3f}" for name, e in zip(names, evaluations, strict=True)]


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2g} M" if parameters < 1e7 else f"{parameters / 1e6:,.0f} M"


def _limits(evaluations: Sequence[Evaluation], first: int) -> tuple[float, float]:
    """All smoothed curves from a position on, and most raw points: single early positions would squeeze the rest."""
    raw = np.concatenate([e.loss[np.isfinite(e.loss)] for e in evaluations])
    curves = np.concatenate([smooth(e.position, e.loss)[first:] for e in evaluations])
    low = min(np.nanmin(curves), np.percentile(raw, 0.5))
    high = max(np.nanmax(curves), np.percentile(raw, 99.5))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _check_comparable(workdirs: Sequence[str | os.PathLike], evaluations: Sequence[Evaluation]) -> None:
    """Curves on one figure must be of the same windows of the same text."""
    first = evaluations[0].about
    for workdir, evaluation in zip(workdirs[1:], evaluations[1:], strict=True):
        for key in ("fingerprint", "context", "windows"):
            if evaluation.about[key] != first[key]:
                raise ConfigError(
                    f"{workdir}: its evaluation has {key} {evaluation.about[key]}, that of {workdirs[0]} {first[key]}; "
                    "expected the same data, context and windows (see ttt eval --help)"
                )
