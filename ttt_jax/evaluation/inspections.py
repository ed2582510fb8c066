"""Hold, summarise, save and read inspections of the inner loop: ``WORKDIR/inspect/NAME.json``, ``.npz`` and ``.csv``.

NAME is, for example, ``validation-2048``; see :mod:`ttt_jax.evaluation.catalogue`.

``.json``  model and data; ``layers``: :class:`ttt_jax.evaluation.inspections.LayerSummary` of each, null for what does
           not exist, is NaN or infinite; ``not_finite``: the number of positions, of all layers, with such a loss
``.npz``   the arrays of :class:`ttt_jax.evaluation.inspections.Inspection`, by their names, without those that are None
``.csv``   tidy: quantity, layer, head, position, value, standard_error. Layers (numbers of blocks) and heads count
           from 0, positions from 1. Without a head, the mean over heads; with one and no position, the mean over
           positions. Where each weight matrix has its own rate, ``eta_0`` is the rate of the first, and so on,
           instead of ``eta``.

Shapes: L layers (the blocks whose mixers learn), H heads, T tokens (the context), n mini-batches, b tokens of each,
M weight matrices of the learner.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ttt_jax.evaluation import catalogue, result_files
from ttt_jax.evaluation.catalogue import name as name
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir

LOSSES = ("loss_at_w0", "loss_before", "loss_after")
_COLUMNS = ("quantity", "layer", "head", "position", "value", "standard_error")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Means over the windows (or documents) that were read. Losses are also means over heads.

    Attributes:
      about: model and data, the content of the ``.json``.
      position: [T], from 1.
      loss_at_w0, loss_before, loss_after: [L, T], the self-supervised loss of a token at W0, at the weights that its
        mini-batch starts with, and after the step of its mini-batch.
      weight_position: [n], the last position of each mini-batch.
      weight_distance: [L, H, n], the Frobenius norm |W - W0| after each mini-batch.
      w0_norm: [L, H], |W0|.
      weight_change: [L, n], the mean over heads of |W - W0| / |W0|; NaN where W0 = 0.
      eta: [L, H, T], the learning rate of a token's gradient without the factor ``position_eta``; [L, H, M, T] where
        each weight matrix of the learner has its own.
      position_eta: [L, b], the factor of the position that uses the gradient: eta[t, s] = position_eta[t] * eta[s].
      target_spread: [L, T], the loss of a learner that predicts the mean of its targets. None for objectives other than
        the squared error.
      *_standard_error: [L, T] or [L, n] (of eta also [L, M, T]), over windows, of the mean over heads; NaN with one
        window.
    """

    about: dict[str, Any]
    position: np.ndarray
    loss_at_w0: np.ndarray
    loss_at_w0_standard_error: np.ndarray
    loss_before: np.ndarray
    loss_before_standard_error: np.ndarray
    loss_after: np.ndarray
    loss_after_standard_error: np.ndarray
    weight_position: np.ndarray
    weight_change: np.ndarray
    weight_change_standard_error: np.ndarray
    weight_distance: np.ndarray
    w0_norm: np.ndarray
    eta: np.ndarray
    eta_standard_error: np.ndarray
    position_eta: np.ndarray
    target_spread: np.ndarray | None = None
    target_spread_standard_error: np.ndarray | None = None

    @property
    def blocks(self) -> list[int]:
        """Return the number of the block, from 0, of each of the L layers."""
        return self.about.get("blocks", list(range(len(self.loss_before))))

    @property
    def by_position(self) -> dict[str, np.ndarray]:
        """Return the arrays by layer and position, [L, T] each: losses and the spread of targets."""
        spread = {} if self.target_spread is None else {"target_spread": self.target_spread}
        return {name: getattr(self, name) for name in LOSSES} | spread


class LayerSummary(NamedTuple):
    """One layer in a line. Losses and spread are means over the last quarter of the positions.

    Attributes:
      explained: 1 - loss_before / target_spread, the share of the spread that W explains before it sees the tokens;
        None without a spread.
      weight_change: at the last position; None where W0 = 0.
      eta, eta_min, eta_max: the mean over positions, of all heads and of the heads with the lowest and the highest
        mean. Where each weight matrix has its own rate, of all heads and matrices.
    """

    loss_at_w0: float
    loss_before: float
    loss_after: float
    explained: float | None
    weight_change: float | None
    eta: float
    eta_min: float
    eta_max: float


def summary(found: Inspection) -> list[LayerSummary]:
    """Summarise each layer."""
    last_quarter = slice(len(found.position) * 3 // 4, None)
    mean = {name: values[:, last_quarter].mean(1) for name, values in found.by_position.items()}
    lines = []
    for layer, etas in enumerate(found.eta.mean(-1)):  # [H] or [H, M]
        at_w0, before, after = (float(mean[name][layer]) for name in LOSSES)
        explained = None
        if "target_spread" in mean:
            with np.errstate(invalid="ignore", divide="ignore"):
                explained = float(1 - before / mean["target_spread"][layer])
        change = float(found.weight_change[layer, -1]) if found.w0_norm[layer].all() else None
        lines.append(
            LayerSummary(
                at_w0, before, after, explained, change, float(etas.mean()), float(etas.min()), float(etas.max())
            )
        )
    return lines


def not_finite(found: Inspection) -> int:
    """Return the number of positions, of all layers, at which a loss is NaN or infinite."""
    return int((~np.isfinite(list(found.by_position.values())).all(0)).sum())


def save(found: Inspection, workdir: str | os.PathLike, stem: str) -> Workdir:
    """Write the three files, the ``.json`` last; return the path of the ``.npz``.

    If ``stem`` is already the name of an inspection of other tokens, keep both (:func:`catalogue.place`).
    """
    folder = workdir_lib.at(workdir) / "inspect"
    stem = catalogue.place(folder, stem, found.about)
    about = {**found.about, "not_finite": not_finite(found), "layers": [layer._asdict() for layer in summary(found)]}
    return result_files.write(folder, stem, found, about, _COLUMNS, _rows(found))


def read(workdir: str | os.PathLike, split: str, context: int | None = None, **kind: Any) -> Inspection:
    """Return the inspection of a run on a split, of the longest context if none is given.

    Args:
      kind: by_document, step, windows, as for :func:`catalogue.entries`.

    Raises:
      ConfigError: if no inspection matches, more than one does, or its files are damaged.
    """
    workdir = workdir_lib.at(workdir)
    entry = catalogue.require(workdir, "inspect", split, context, **kind)
    return result_files.read(workdir / "inspect" / f"{entry.stem}.npz", Inspection, "ttt inspect")


def _rows(found: Inspection) -> Iterator[tuple]:
    """Yield the rows of the table; errors of a single window and changes of a W0 that is zero are empty."""
    means = {key: (found.position, values) for key, values in found.by_position.items()}
    means["weight_change"] = found.weight_position, found.weight_change
    means["weight_distance"] = found.weight_position, found.weight_distance.mean(1)
    errors = {key: getattr(found, f"{key}_standard_error", np.full_like(x, np.nan)) for key, (_, x) in means.items()}
    rates = _rates(found)
    means |= {key: (found.position, eta.mean(1)) for key, (eta, _) in rates.items()}
    errors |= {key: error for key, (_, error) in rates.items()}
    for key, (positions, values) in means.items():
        for layer, block in enumerate(found.blocks):
            line, line_errors = values[layer], errors[key][layer]
            for position, value, error in zip(positions.tolist(), line.tolist(), line_errors.tolist(), strict=True):
                unknown = key == "weight_change" and np.isnan(value) and not found.w0_norm[layer].all()
                yield key, block, None, position, None if unknown else value, None if np.isnan(error) else error
    of_heads = {"w0_norm": found.w0_norm, **{key: eta.mean(2) for key, (eta, _) in rates.items()}}
    of_heads["weight_distance"] = found.weight_distance.mean(2)
    for key, values in of_heads.items():
        for (layer, head), value in np.ndenumerate(values):
            yield key, found.blocks[layer], head, None, float(value), None
    for (layer, place), value in np.ndenumerate(found.position_eta):
        if not np.isnan(value):  # padding: mini-batches of other layers are longer
            yield "position_eta", found.blocks[layer], None, place + 1, float(value), None


def _rates(found: Inspection) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return eta [L, H, T] with its errors [L, T] by name: one for all weight matrices, or one for each."""
    if found.eta.ndim == 3:
        return {"eta": (found.eta, found.eta_standard_error)}
    matrices = range(found.eta.shape[2])
    return {f"eta_{i}": (found.eta[:, :, i], found.eta_standard_error[:, i]) for i in matrices}
