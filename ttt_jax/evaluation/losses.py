"""The loss of every token of sequences, read in pieces with the state carried from one to the next.

Memory does not grow with the length of a sequence but by what the state holds and four bytes a token.

Shapes: B batch (over all devices), T tokens of a piece, L layers.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ttt_jax.data import sequences as sequences_lib
from ttt_jax.data.sequences import Sequences
from ttt_jax.data.token_source import TokenSource
from ttt_jax.distributed import sharding
from ttt_jax.evaluation.trained import Trained
from ttt_jax.training.loss import token_nll


def of_sequences(
    trained: Trained, source: TokenSource, sequences: Sequences, *, piece_length: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the losses of each sequence, in order: [its tokens], float32.

    All targets have a loss, also those that do not count: see :func:`ttt_jax.data.sequences.counted`. On many processes
    all of them make the same calls, and get the same losses.

    Args:
      piece_length: T. Sequences that are not longer are read in one go.
      batch_size: B, rounded up to a multiple of ``trained.rows``.
    """
    batch_size = math.ceil(batch_size / trained.rows) * trained.rows
    rows = sharding.rows_here(trained.batch_sharding, batch_size)
    longest = max(map(sequences_lib.length, sequences))
    whole = longest <= piece_length
    capacity = math.ceil(longest / piece_length) * piece_length  # tokens that a state has room for
    read = _Reader(trained, batch_size, capacity)
    first, found = 0, []
    for piece in sequences_lib.pieces(source, sequences, piece_length=piece_length, batch_size=batch_size):
        here = {key: x[rows] for key, x in piece.batch.items() if key != "mask"}
        batch = sharding.global_batch(here, rows, batch_size, trained.batch_sharding)
        nll = read.whole(batch) if whole else read.piece(batch, piece.begins)
        found.append(nll.astype(np.float32))
        if piece.ends:
            losses = np.concatenate(found, axis=1)
            for row in range(piece.rows):
                yield losses[row, : sequences_lib.length(sequences[first + row])]
            first, found = first + piece.rows, []


class _Reader:
    """The compiled model, and where it stands in its sequences."""

    def __init__(self, trained: Trained, batch_size: int, capacity: int):
        self._trained = trained
        everywhere = NamedSharding(trained.mesh, PartitionSpec())

        def make():
            return trained.model.initial_state(batch_size, capacity)

        def whole(params, inputs, targets):
            return token_nll(trained.model.apply({"params": params}, inputs)[0], targets)

        def piece(params, state, inputs, targets):
            logits, state = trained.model.apply({"params": params}, inputs, state)
            return token_nll(logits, targets), state

        states = sharding.by_axes(trained.model.state_axes(), trained.mesh, trained.rules)
        self._start = jax.jit(make, out_shardings=states)
        self._whole = jax.jit(whole, out_shardings=everywhere)
        self._piece = jax.jit(piece, out_shardings=(everywhere, states), donate_argnums=1)
        self._state: Any = None

    def whole(self, batch: dict[str, jax.Array]) -> np.ndarray:
        """Losses of whole sequences, [B, T]."""
        with sharding.on_mesh(self._trained.mesh, self._trained.rules):
            return np.asarray(self._whole(self._trained.params, batch["inputs"], batch["targets"]))

    def piece(self, batch: dict[str, jax.Array], begins: bool) -> np.ndarray:
        """Losses of the next piece, [B, T]."""
        with sharding.on_mesh(self._trained.mesh, self._trained.rules):
            if begins:
                self._state = None  # before there is another
                self._state = self._start()
            nll, self._state = self._piece(self._trained.params, self._state, batch["inputs"], batch["targets"])
            return np.asarray(nll)
