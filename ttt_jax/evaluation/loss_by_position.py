"""Loss by token index: how much a model gains from what it has read.

Shapes: B batch, T tokens (the context), N windows.
"""

import csv
import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Callable

import jax
import numpy as np

from ttt_jax import config_file
from ttt_jax import workdir as workdir_lib
from ttt_jax.config import ConfigError
from ttt_jax.data import documents, pipeline, source, sources
from ttt_jax.evaluation.trained import load
from ttt_jax.models import build
from ttt_jax.training.loss import token_nll
from ttt_jax.training.metrics import write_atomically
from ttt_jax.workdir import Workdir, explained, is_local


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Mean loss of a split by token index; nats per token.

    Attributes:
      loss: [T], mean over the windows in which the token at that index counts; NaN where it counts in none.
      standard_error: [T], of that mean, over windows.
      count: [T], windows in which it counts.
      mean: over all tokens that count.
      mean_standard_error: of ``mean``, over windows.
      windows: N.
    """

    loss: np.ndarray
    standard_error: np.ndarray
    count: np.ndarray
    mean: float
    mean_standard_error: float
    windows: int

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss."""
        return math.exp(self.mean)


def summarise(nll: np.ndarray, mask: np.ndarray) -> LossByPosition:
    """Statistics of the loss of N windows.

    Args:
      nll, mask: [N, T]; at least one entry of the mask is set.
    """
    nll, mask = np.asarray(nll, np.float64), np.asarray(mask, np.float64)
    count = mask.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        loss = (nll * mask).sum(0) / count
        variance = (mask * (nll - loss) ** 2).sum(0) / (count - 1)
        standard_error = np.sqrt(variance / count)
    total = mask.sum()
    mean = (nll * mask).sum() / total
    n = len(nll)
    # The mean is a ratio of two sums over windows; this is its standard error to first order.
    residuals = ((nll - mean) * mask).sum(1)
    mean_error = math.sqrt((residuals**2).sum() * n / (n - 1)) / total if n > 1 else math.nan
    return LossByPosition(loss, standard_error, count.astype(np.int64), float(mean), float(mean_error), n)


def evaluate(
    workdir: str | os.PathLike,
    *,
    context: int,
    split: str = "validation",
    most_windows: int = 256,
    by_document: bool = False,
    step: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LossByPosition, dict]:
    """Evaluates a checkpoint of a run on windows of ``context`` tokens, spread evenly over a split.

    Args:
      workdir: of the run; its ``config.json`` names model and data.
      most_windows: evaluates all windows (or documents) of the split, or this many.
      by_document: the windows are the documents, each from its beginning to its end or to ``context`` tokens. They are
        read in pieces of the training context, the state carried from one to the next, so that memory does not grow
        with the context but by what the state holds.
      step: which checkpoint; None is the newest.
      batch_size: windows at a time; None is about as many tokens as a training step has.
      progress: is called with windows done and windows in all.

    Returns:
      The losses, and what they are losses of (run, step, dataset, counts), as JSON can hold it.

    Raises:
      ConfigError: where there is no such run, checkpoint, split or context.
    """
    if context < 1 or most_windows < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError("--context, --max-windows and --batch-size: expected 1 or more")
    workdir = workdir_lib.at(workdir)
    config = config_file.from_json(workdir / "config.json")
    data = sources.from_config(config, split)
    source.check(data, config.model.vocab_size, 1 if by_document else context)
    devices = jax.device_count()
    if batch_size is None:
        at_a_time = min(context, config.data.sequence_length) if by_document else context
        batch_size = max(1, config.data.batch_size * config.data.sequence_length // at_a_time)
    batch_size = -(-batch_size // devices) * devices
    trained = load(workdir, step)
    model, params, step, place = trained.model, trained.params, trained.step, trained.batch_sharding

    options = {"context": context, "batch_size": batch_size, "most_windows": most_windows, "progress": progress}
    if by_document:
        nll, mask = _of_documents(model, params, place, data, piece_length=config.data.sequence_length, **options)
    else:
        nll, mask = _of_windows(model, params, place, data, **options)
    result = summarise(nll, mask)
    about = {
        "workdir": workdir.resolve().name,
        "model": build.describe(config.model),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "step": step,
        "source": data.name,
        "fingerprint": data.fingerprint(),
        "split": split,
        "of": "documents" if by_document else "windows",
        "context": context,
        "training_context": config.data.sequence_length,
        "windows": result.windows,
        "tokens": int(result.count.sum()),
        "loss": result.mean,
        "loss_standard_error": result.mean_standard_error,
        "perplexity": result.perplexity,
    }
    return result, about


def _of_windows(model, params, place, data, *, context, batch_size, most_windows, progress):
    """Losses and masks [N, T] of windows from all over a split."""
    losses = jax.jit(lambda params, inputs, targets: token_nll(model.apply({"params": params}, inputs)[0], targets))
    windows = min(data.windows(context), most_windows)
    nll, mask = [], []
    for batch in pipeline.evaluation_batches(
        data, sequence_length=context, batch_size=batch_size, most_windows=most_windows
    ):
        inputs, targets = jax.device_put((batch["inputs"], batch["targets"]), place)
        nll.append(np.asarray(losses(params, inputs, targets)))
        mask.append(batch["mask"])
        progress(min(len(nll) * batch_size, windows), windows)
    return np.concatenate(nll)[:windows], np.concatenate(mask)[:windows]


def _of_documents(model, params, place, data, *, context, piece_length, batch_size, most_windows, progress):
    """Losses and masks [N, T] of documents, each from its beginning, the state carried from piece to piece."""
    piece_length = min(piece_length, context)
    length = -(-context // piece_length) * piece_length

    @functools.partial(jax.jit, donate_argnums=1)
    def losses(params, state, inputs, targets):
        logits, state = model.apply({"params": params}, inputs, state)
        return token_nll(logits, targets), state

    total = min(sum(1 for _ in documents.bounds(data)), most_windows)
    nll = np.zeros((total, length), np.float32)
    mask = np.zeros((total, length), np.float32)
    first, rows, offset, state = 0, 0, 0, None
    for piece in documents.pieces(
        data, piece_length=piece_length, batch_size=batch_size, most_documents=total, most_tokens=context
    ):
        if piece.begins:
            first, rows, offset = first + rows, piece.rows, 0
            state = jax.jit(lambda: model.initial_state(batch_size, length))()
        inputs, targets = jax.device_put((piece.batch["inputs"], piece.batch["targets"]), place)
        found, state = losses(params, state, inputs, targets)
        where = slice(first, first + rows), slice(offset, offset + piece_length)
        nll[where], mask[where] = np.asarray(found)[:rows], piece.batch["mask"][:rows]
        offset += piece_length
        progress(first, total)
    progress(total, total)
    return nll[:, :context], mask[:, :context]


def save(result: LossByPosition, about: dict, folder: Workdir) -> Workdir:
    """Writes ``<split>-<context>.npz``, ``.csv`` and ``.json``; returns the path of the ``.npz``.

    Of documents, ``<split>-documents-<context>``.
    """
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    of = "documents-" if about["of"] == "documents" else ""
    stem = folder / f"{about['split']}-{of}{about['context']}"
    positions = np.arange(1, len(result.loss) + 1)
    columns = {
        "position": positions,
        "loss": result.loss,
        "standard_error": result.standard_error,
        "count": result.count,
    }
    table, arrays = io.StringIO(newline=""), io.BytesIO()
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    np.savez(arrays, allow_pickle=False, **columns)
    with explained(folder):
        stem.with_suffix(".csv").write_bytes(table.getvalue().encode())
        write_atomically(stem.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
        stem.with_suffix(".npz").write_bytes(arrays.getvalue())
    return stem.with_suffix(".npz")
