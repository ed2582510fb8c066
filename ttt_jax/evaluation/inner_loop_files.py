"""Inner-loop diagnostics as files: ``WORKDIR/inspect/NAME.json``, ``.npz`` and ``.csv``.

NAME is such as ``validation-2048``, see :mod:`ttt_jax.evaluation.catalogue`.

``.json``  what was read and by what; ``layers``: :class:`ttt_jax.evaluation.inner_loop.LayerSummary` of each, null for
           what does not exist, is NaN or infinite; ``not_finite``: positions of layers with such a loss
``.npz``   the arrays of :class:`ttt_jax.evaluation.inner_loop.InnerLoop`, by its names, without those that are None
``.csv``   tidy: quantity, layer, head, position, value, standard_error. Layers (numbers of blocks) and heads count
           from 0, positions from 1. Without a head, the mean over heads; with one and no position, the mean over
           positions. Where each weight matrix has a rate of its own, ``eta_0`` is that of the first, and so on, in
           place of ``eta``.
"""

import os
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np

from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import catalogue, result_files
from ttt_jax.evaluation.catalogue import name as name
from ttt_jax.evaluation.inner_loop import InnerLoop, not_finite, summary
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir

_COLUMNS = ("quantity", "layer", "head", "position", "value", "standard_error")


def save(found: InnerLoop, workdir: str | os.PathLike, stem: str) -> Workdir:
    """Write the three files; return the path of the ``.npz``. The ``.json`` is written last.

    Where ``stem`` is the name of diagnostics of other tokens, both are kept (:func:`catalogue.place`).
    """
    folder = workdir_lib.at(workdir) / "inspect"
    stem = catalogue.place(folder, stem, found.about)
    about = {**found.about, "not_finite": not_finite(found), "layers": [layer._asdict() for layer in summary(found)]}
    return result_files.write(folder, stem, found, about, _COLUMNS, _rows(found))


def read(workdir: str | os.PathLike, split: str, context: int | None = None, **kind: Any) -> InnerLoop:
    """Return the diagnostics of a run on a split; of the longest context that there is, where none is given.

    Args:
      kind: by_document, step, windows, as of :func:`catalogue.entries`.

    Raises:
      ConfigError: where there are none, or more than one, or they are damaged.
    """
    workdir = workdir_lib.at(workdir)
    entry = catalogue.find(workdir / "inspect", split, context, **kind)
    if entry is None:
        workdir_lib.check_exists(workdir)
        step = kind.get("step")
        raise ConfigError(
            f"{workdir}: no inner-loop diagnostics of the {split} split"
            + ("" if context is None else f" with context {context}")
            + f"{catalogue.there_are(workdir / 'inspect')}"
            + f"; run: ttt inspect --workdir {shlex.quote(str(workdir))} --split {split} --context {context or 2048}"
            + " --by-document" * kind.get("by_document", False)
            + ("" if step is None else f" --step {step}")
        )
    return result_files.read(workdir / "inspect" / f"{entry.stem}.npz", InnerLoop, "ttt inspect")


def _rows(found: InnerLoop) -> Iterator[tuple]:
    """Yield the rows of the table. Empty are errors of a single window and changes of a W0 that is zero."""
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
        if not np.isnan(value):  # mini-batches of other layers are longer
            yield "position_eta", found.blocks[layer], None, place + 1, float(value), None


def _rates(found: InnerLoop) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return eta [L, H, T] with its errors [L, T] by name: one of all weight matrices, or one of each."""
    if found.eta.ndim == 3:
        return {"eta": (found.eta, found.eta_standard_error)}
    matrices = range(found.eta.shape[2])
    return {f"eta_{i}": (found.eta[:, :, i], found.eta_standard_error[:, i]) for i in matrices}
