"""Inspect the inner loop of a trained model: its losses, weights and learning rates by position, layer by layer.

Figures 4 and 14 of the paper are ``loss_at_w0``, ``loss_before`` and ``loss_after``.

Shapes: L layers (the blocks whose mixers learn), H heads, T tokens (the context), n mini-batches, b tokens of each,
B sequences at a time, M weight matrices of the learner.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ttt_jax.data import named_sources, pipeline, sequences, token_source
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import inspections
from ttt_jax.evaluation.inspections import Inspection
from ttt_jax.evaluation.trained import Trained
from ttt_jax.mixers import MIXERS
from ttt_jax.models import pattern
from ttt_jax.storage.workdir import Workdir

_WITH_ERRORS = (*inspections.LOSSES, "target_spread", "weight_change", "eta")  # means over heads, of each window
_BY_HEAD = ("weight_distance", "eta")


def check(workdir: Workdir, model: ml_collections.ConfigDict) -> None:
    """Raise :class:`ConfigError` if the model of a run has no inner loop."""
    if not pattern.learning_kinds(model):
        raise ConfigError(
            f"--workdir {workdir}: its {pattern.describe(model)} has no inner loop; expected a run with model.mixer="
            f"{' or '.join(name for name, mixer in MIXERS.items() if mixer.learns)}"
        )


def inspect(
    trained: Trained,
    *,
    context: int,
    split: str = "validation",
    most_windows: int = 64,
    by_document: bool = False,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Return the statistics of the inner loop over windows of ``context`` tokens, spread evenly over a split.

    A context longer than that of training is read in pieces, the state carried from one to the next, so that memory
    does not grow with the context.

    Args:
      most_windows: the number of windows (or documents); all of the split if it has fewer.
      by_document: read the first ``context`` tokens of documents that have more than ``context``; otherwise windows lie
        anywhere in documents and across them.
      batch_size: windows per batch, without influence on the results; by default, about as many tokens as a training
        step has.
      progress: called with the number of tokens read and the total.

    Raises:
      ConfigError: if the model has no inner loop, or the split or the context does not exist.
    """
    config = trained.config
    check(trained.workdir, config.model)
    data = named_sources.from_config(config, split)
    token_source.check(data, config.model.vocab_size, 1 if by_document else context, length_key="--context ")
    starts = _starts(data, context, most_windows, by_document)
    training_context, sizes = config.data.sequence_length, _mini_batches(config.model)
    b, whole = min(sizes), math.lcm(*sizes)
    piece_length = context if context <= training_context else max(1, training_context // whole) * whole
    if batch_size is None:
        batch_size = max(1, config.data.batch_size * training_context // piece_length)
    batch_size = -(-min(batch_size, len(starts)) // trained.rows) * trained.rows

    means: dict[str, _Mean] = {}
    by_head: dict[str, np.ndarray] = {}  # sums over windows, [L, T, H] or [L, T, H, M]
    constants: dict[str, np.ndarray] = {}
    done, total = 0, len(starts) * context
    progress(done, total)
    for offset, rows, statistics in _read(trained, data, starts, context, piece_length, batch_size):
        constants = {name: statistics.pop(name) for name in ("w0_norm", "position_eta")}
        values = {name: np.asarray(x[:, :rows], np.float64) for name, x in statistics.items()}
        end = min(offset + piece_length, context)
        for name in _BY_HEAD:
            x = values[name]  # [L, windows, tokens, H, ...]
            sums = by_head.setdefault(name, np.zeros((len(x), context, *x.shape[3:])))
            sums[:, offset:end] += x.sum(1)
        values["eta"] = values["eta"].mean(3)
        for name in _WITH_ERRORS:
            if name in values:
                x = values[name]
                means.setdefault(name, _Mean((len(x), context, *x.shape[3:]), len(starts))).add(offset, x)
        done += rows * (end - offset)
        progress(done, total)

    ends = np.unique(np.append(np.arange(b - 1, context, b), context - 1))
    arrays = {name: mean.mean for name, mean in means.items()}
    arrays |= {f"{name}_standard_error": mean.standard_error for name, mean in means.items()}
    arrays |= {name: sums / len(starts) for name, sums in by_head.items()}
    arrays = {name: np.moveaxis(x, 1, -1) for name, x in arrays.items()}  # the tokens last
    arrays |= {name: x[..., ends] for name, x in arrays.items() if name.startswith("weight_")}
    arrays |= {"position": np.arange(1, context + 1), "weight_position": ends + 1, **constants}
    about = _about(trained, data, split, context, by_document, len(starts))
    return Inspection(about, **arrays)


def _starts(data: TokenSource, context: int, most: int, by_document: bool) -> list[int]:
    """Return where windows begin, or documents with more than ``context`` tokens."""
    if not by_document:
        return [window[0].start for window in sequences.windows(data, context, most)]
    starts = sequences.document_starts(data)
    lengths = np.diff(starts, append=len(data.tokens))
    found = starts[lengths > context].tolist()
    if not found:
        raise ConfigError(
            f"--context {context}: no document of {data.name} has more tokens; expected less than the longest has, "
            f"{lengths.max(initial=0)}"
        )
    count = min(len(found), most)
    return [found[i * len(found) // count] for i in range(count)]


def _read(
    trained: Trained, data: TokenSource, starts: list[int], context: int, piece_length: int, batch_size: int
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Yield for each piece its offset within the windows, how many rows are windows, and the statistics of all rows."""
    in_one_pass = context <= piece_length

    @jax.jit
    def read(params, state, inputs):
        (_, state), filled = trained.model.apply({"params": params}, inputs, state, mutable=["statistics"])
        found = _stacked([block["mixer"] for block in trained.model.by_block(filled["statistics"]) if block])
        w0_norm = found["w0_norm"][:, None, None]
        change = jnp.where(w0_norm > 0, found["weight_distance"] / w0_norm, jnp.nan)
        return state, {
            **found,
            "weight_change": change.mean(-1),
            **{name: found[name].mean(-1) for name in (*inspections.LOSSES, "target_spread") if name in found},
        }

    for first in range(0, len(starts), batch_size):
        group = starts[first : first + batch_size]
        state = None
        if not in_one_pass:
            with sharding.on_mesh(trained.mesh, trained.rules):
                state = jax.jit(lambda: trained.model.initial_state(batch_size, context))()
        for offset in range(0, context, piece_length):
            end = min(offset + piece_length, context)
            batch = pipeline.stacked([data.piece(start + offset, start + end) for start in group], batch_size)
            inputs = jax.device_put(batch["inputs"], trained.batch_sharding)
            with sharding.on_mesh(trained.mesh, trained.rules):
                state, statistics = read(trained.params, state, inputs)
            yield offset, len(group), jax.device_get(statistics)


def _stacked(blocks: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Return the statistics of blocks as arrays [L, ...].

    Statistics that some blocks lack are left out. Where mini-batches differ in size, the position rates of the smaller
    ones are padded with NaN; where the numbers of rates per token differ, eta is their mean.
    """
    if len({block["eta"].shape for block in blocks}) > 1:
        blocks = [{**block, "eta": block["eta"].reshape(*block["loss_before"].shape, -1).mean(-1)} for block in blocks]
    longest = max(len(block["position_eta"]) for block in blocks)
    found = {}
    for name in blocks[0]:
        values = [block[name] for block in blocks if name in block]
        if name == "position_eta":
            values = [jnp.pad(x, (0, longest - len(x)), constant_values=jnp.nan) for x in values]
        if len(values) == len(blocks):
            found[name] = jnp.stack(values)
    return found


def _mini_batches(model: ml_collections.ConfigDict) -> list[int]:
    """Return the sizes of the mini-batches of the blocks that learn."""
    return [kind.model.ttt.mini_batch for kind in pattern.learning_kinds(model)]


def _blocks(model: ml_collections.ConfigDict) -> list[int]:
    """Return which blocks of the model learn, from 0."""
    return [place for place, run in enumerate(pattern.blocks(model)) if MIXERS[run.model.mixer].learns]


class _Mean:
    """The mean over N windows and its standard error, [L, T, ...], in float64."""

    def __init__(self, shape: tuple[int, ...], windows: int):
        self._sum, self._squares, self._n = np.zeros(shape), np.zeros(shape), windows

    def add(self, offset: int, values: np.ndarray) -> None:
        """Add the values [L, windows, tokens, ...] of the tokens from ``offset`` on."""
        where = slice(offset, offset + values.shape[2])
        self._sum[:, where] += values.sum(1)
        self._squares[:, where] += (values**2).sum(1)

    @property
    def mean(self) -> np.ndarray:
        return self._sum / self._n

    @property
    def standard_error(self) -> np.ndarray:
        if self._n == 1:
            return np.full_like(self._sum, np.nan)
        with np.errstate(invalid="ignore"):  # infinity - infinity
            return np.sqrt(np.maximum(0, self._squares / self._n - self.mean**2) / (self._n - 1))


def _about(
    trained: Trained, data: TokenSource, split: str, context: int, by_document: bool, windows: int
) -> dict[str, Any]:
    model = trained.config.model
    return {
        **trained.description,
        "step": trained.step,
        "source": data.name,
        "fingerprint": data.fingerprint(),
        "split": split,
        "of": "documents" if by_document else "windows",
        "context": context,
        "windows": windows,
        "tokens": windows * context,
        "mini_batch": min(_mini_batches(model)),
        "blocks": _blocks(model),
        "config": trained.config.to_dict(),
    }
