"""Probe a run with the synthetic task it was trained on: accuracy by number of items, context and distance.

Shapes: B sequences side by side, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttt_jax.data import synthetic
from ttt_jax.data.synthetic import Example
from ttt_jax.distributed import sharding
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation.probes.cells import Cell, Cells, finite_or_none, share
from ttt_jax.evaluation.trained import Trained
from ttt_jax.storage.workdir import Workdir

CONDITIONS = ("step", "checkpoint", "split", "samples")
PLACE = ("items", "context")


def cells(workdir: Workdir, task: str) -> Cells:
    """Return the cells of a task of a run, in ``WORKDIR/probe/TASK.json`` and ``.csv``."""
    return Cells(workdir, task, (*CONDITIONS, *PLACE))


def task_of(config: ml_collections.ConfigDict) -> tuple[str, int]:
    """Return the task that a run was trained on, and its number of items.

    Raises:
      ConfigError: if the run was not trained on a task.
    """
    location = config.data.source
    if not synthetic.is_task(location):
        raise ConfigError(
            f"data.source={location!r}: is not a task to probe; expected a run on one of {', '.join(synthetic.TASKS)}"
        )
    found = synthetic.task_source(location, "train", config.model.vocab_size, config.data.sequence_length)
    return found.task, found.items


def probe(
    trained: Trained,
    *,
    items: Sequence[int],
    contexts: Sequence[int],
    samples: int = 256,
    split: str = "validation",
    batch_size: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Cell]:
    """Measure the accuracy of a trained model on sequences it has not seen; save each cell when it is known.

    Args:
      items: numbers of pairs to recall, or of symbols to copy.
      contexts: lengths of sequences in tokens.
      samples: sequences per cell.
      batch_size: sequences per batch; by default, as many tokens as a training step has.
      progress: called with a description of the current work.

    Returns:
      The cells. ``accuracy`` is the share of answers that are the likeliest token, with the 95 % interval it would have
      if answers were independent; ``whole`` is the share of sequences with all answers right; ``loss`` is in nats per
      answer. Values that depend on a NaN or infinite loss are None, and ``not_finite`` is the number of answers with
      such losses. ``by_distance`` lists accuracies by the number of tokens between an answer and the token it repeats,
      up to 1, 2, 4, ...

    Raises:
      ConfigError: if items do not fit a context or the vocabulary.
    """
    task, _ = task_of(trained.config)
    kept = cells(trained.workdir, task)
    conditions = {"step": trained.step, "checkpoint": trained.fingerprint, "split": split, "samples": samples}
    about = {"probe": "task", "task": task, **trained.description, "config": trained.config.to_dict()}
    wanted = [(number, context) for number in items for context in contexts]
    read = _reader(trained)
    vocab_size = trained.config.model.vocab_size
    sources = {  # raises for items that do not fit, before anything is computed
        (number, context): synthetic.task_source(f"{task}:{number}", split, vocab_size, context)
        for number, context in wanted
    }
    with kept.locked():
        known = {tuple(cell[key] for key in PLACE): cell for cell in kept.find(**conditions)}
        for number, context in wanted:
            if (number, context) in known:
                continue
            progress(f"{task}, {number} {synthetic.TASKS[task].items}, context {context}")
            examples = [sources[number, context].example(index) for index in range(samples)]
            size = batch_size or trained.config.data.batch_size * trained.config.data.sequence_length // context
            found = _summary(examples, *_predictions(trained, read, examples, max(1, min(size, samples))))
            cell = {**conditions, "items": number, "context": context, **found}
            kept.add(cell, about)
            known[number, context] = cell
    return [known[place] for place in wanted]


def _reader(trained: Trained):
    @jax.jit
    def read(params, inputs, targets):
        logits, _ = trained.model.apply({"params": params}, inputs)
        log_likelihood = jax.nn.log_softmax(logits)
        return logits.argmax(-1), -jnp.take_along_axis(log_likelihood, targets[..., None], -1)[..., 0]

    return read


def _predictions(trained: Trained, read, examples: Sequence[Example], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest next token and the loss of the true one, [samples, T] each."""
    batch_size = -(-batch_size // trained.rows) * trained.rows
    tokens = np.stack([example.tokens for example in examples])
    likeliest: list[np.ndarray] = []
    loss: list[np.ndarray] = []
    with sharding.on_mesh(trained.mesh, trained.rules):
        for first in range(0, len(tokens), batch_size):
            rows = tokens[first : first + batch_size]
            filled = np.concatenate([rows, np.repeat(rows[-1:], batch_size - len(rows), 0)])
            batch = jax.device_put((filled[:, :-1], filled[:, 1:]), trained.batch_sharding)
            for found, parts in zip(read(trained.params, *batch), (likeliest, loss), strict=True):
                parts.append(np.asarray(found)[: len(rows)])
    return np.concatenate(likeliest), np.concatenate(loss)


def _summary(examples: Sequence[Example], likeliest: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    right = np.stack([e.tokens[e.answers] == row[e.answers - 1] for e, row in zip(examples, likeliest, strict=True)])
    lost = np.stack([row[e.answers - 1] for e, row in zip(examples, loss, strict=True)])
    distance = np.stack([e.answers - e.sources for e in examples])
    finite = np.isfinite(lost)  # [samples, answers]
    known = bool(finite.all())
    correct = int(right.sum()) if known else None
    accuracy, low, high = share(correct, right.size)
    whole, whole_low, whole_high = share(int(right.all(1).sum()) if known else None, len(right))
    return {
        "answers": right.size,
        "not_finite": int((~finite).sum()),
        "correct": correct,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "whole": whole,
        "whole_low": whole_low,
        "whole_high": whole_high,
        "loss": finite_or_none(lost.astype(np.float64).mean()),
        "by_distance": _by_distance(distance, right, finite),
    }


def _by_distance(distance: np.ndarray, right: np.ndarray, finite: np.ndarray) -> list[dict[str, Any]]:
    found, last = [], 1
    while last // 2 < distance.max():
        in_octave = (distance > last // 2) & (distance <= last)
        if in_octave.any():
            correct, n = int(right[in_octave].sum()) if finite[in_octave].all() else None, int(in_octave.sum())
            accuracy, low, high = share(correct, n)
            first = last // 2 + 1
            cell = {"first": first, "last": last, "answers": n, "correct": correct, "accuracy": accuracy}
            found.append({**cell, "low": low, "high": high})
        last *= 2
    return found
