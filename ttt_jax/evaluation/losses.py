"""Compute the loss of every token of sequences, and the likelihood of the last tokens of texts.

Long inputs are read in pieces, the state carried from one to the next: memory grows with the length only by what the
state holds and by a few bytes per token.

Shapes: B batch (over all devices), T tokens of a piece.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    """Yield the losses of each sequence, in order: [tokens], float32.

    All targets have a loss, also those that do not count (:func:`ttt_jax.data.sequences.counted`). All processes must
    make the same call, and get the same losses.

    Args:
      piece_length: T; sequences up to this length are read in one pass.
      batch_size: B, rounded up to a multiple of ``trained.rows``.
    """
    batch_size = math.ceil(batch_size / trained.rows) * trained.rows
    rows = sharding.rows_of_this_process(trained.batch_sharding, batch_size)
    longest = max(map(sequences_lib.length, sequences))
    whole = longest <= piece_length
    capacity = math.ceil(longest / piece_length) * piece_length  # tokens that the state has room for
    read = _Reader(trained, batch_size, capacity)
    first, found = 0, []
    for piece in sequences_lib.pieces(source, sequences, piece_length=piece_length, batch_size=batch_size):
        local = {key: x[rows] for key, x in piece.batch.items() if key != "mask"}
        batch = sharding.global_batch(local, rows, batch_size, trained.batch_sharding)
        nll = read.whole(batch) if whole else read.piece(batch, piece.begins)
        found.append(nll.astype(np.float32))
        if piece.ends:
            losses = np.concatenate(found, axis=1)
            for row in range(piece.rows):
                yield losses[row, : sequences_lib.length(sequences[first + row])]
            first, found = first + piece.rows, []


class _Reader:
    """The compiled model, and its state within the sequences."""

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

        states = sharding.shardings_of_axes(trained.model.state_axes(), trained.mesh, trained.rules)
        self._start = jax.jit(make, out_shardings=states)
        self._whole = jax.jit(whole, out_shardings=everywhere)
        self._piece = jax.jit(piece, out_shardings=(everywhere, states), donate_argnums=1)
        self._state: Any = None

    def whole(self, batch: dict[str, jax.Array]) -> np.ndarray:
        """Return the losses of whole sequences, [B, T]."""
        with sharding.on_mesh(self._trained.mesh, self._trained.rules):
            return np.asarray(self._whole(self._trained.params, batch["inputs"], batch["targets"]))

    def piece(self, batch: dict[str, jax.Array], begins: bool) -> np.ndarray:
        """Return the losses of the next piece, [B, T]; start from a fresh state if it ``begins`` sequences."""
        with sharding.on_mesh(self._trained.mesh, self._trained.rules):
            if begins:
                self._state = None  # frees its memory before the next one is made
                self._state = self._start()
            nll, self._state = self._piece(self._trained.params, self._state, batch["inputs"], batch["targets"])
            return np.asarray(nll)


_SHORTEST = 32  # tokens that texts are padded to; longer ones to twice as many, four times, ...


class Text(NamedTuple):
    """Tokens [N], of which the last ``counted`` are to be predicted; the first token never is."""

    tokens: np.ndarray
    counted: int


class Score(NamedTuple):
    """The score of the counted tokens of a text.

    Attributes:
      log_likelihood: the sum over tokens, in nats.
      greedy: whether each token is the likeliest one, so that greedy decoding would give all of them.
    """

    log_likelihood: float
    greedy: bool


class Scorer:
    """A trained model that scores the last tokens of texts, given those before them.

    Texts are padded to few lengths, so that few programs are compiled. Scores do not depend on the batch size.

    Args:
      batch_size: texts of the training context per batch, and proportionally more of shorter ones; by default, about as
        many tokens as a training step has.
    """

    def __init__(self, trained: Trained, batch_size: int | None = None):
        self._trained, data = trained, trained.config.data
        self._piece_length = data.sequence_length
        self._tokens_at_a_time = (batch_size or data.batch_size) * data.sequence_length

        @jax.jit
        def whole(params, inputs, targets):
            return _scores(trained.model.apply({"params": params}, inputs)[0], targets)

        @functools.partial(jax.jit, donate_argnums=1)
        def piece(params, state, inputs, targets):
            logits, state = trained.model.apply({"params": params}, inputs, state)
            return _scores(logits, targets), state

        self._whole, self._piece = whole, piece
        self._start = jax.jit(trained.model.initial_state, static_argnums=(0, 1))

    def score(self, texts: Sequence[Text], progress: Callable[[int], None] = lambda texts: None) -> list[Score]:
        """Score texts of any lengths.

        Args:
          progress: called with the number of texts just scored.
        """
        found: list[Score] = [Score(0.0, True)] * len(texts)
        by_length: dict[int, list[int]] = {}
        for i, text in enumerate(texts):
            by_length.setdefault(self._padded(len(text.tokens) - 1), []).append(i)
        for length in sorted(by_length, reverse=True):  # if memory does not suffice, fail at once
            indices = by_length[length]
            fitting = max(1, self._tokens_at_a_time // min(length, self._piece_length))
            rows = min(fitting, 1 << (len(indices) - 1).bit_length())
            rows = -(-rows // self._trained.rows) * self._trained.rows
            for first in range(0, len(indices), rows):
                group = indices[first : first + rows]
                for i, score in zip(group, self._of_batch([texts[i] for i in group], length, rows), strict=True):
                    found[i] = score
                progress(len(group))
        return found

    def _padded(self, length: int) -> int:
        """Return the length to pad to: a power of two, or a multiple of the training context above it."""
        if length > self._piece_length:
            return -(-length // self._piece_length) * self._piece_length
        return min(self._piece_length, max(_SHORTEST, 1 << (length - 1).bit_length()))

    def _of_batch(self, texts: Sequence[Text], length: int, rows: int) -> Iterable[Score]:
        tokens = np.zeros((rows, length + 1), np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text.tokens)] = text.tokens
        nll, likeliest = self._read(tokens[:, :-1], tokens[:, 1:])
        for row, text in enumerate(texts):
            counted = slice(len(text.tokens) - 1 - text.counted, len(text.tokens) - 1)
            yield Score(-float(nll[row, counted].sum(dtype=np.float64)), bool(likeliest[row, counted].all()))

    def _read(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss, and whether the target is the likeliest token: [B, T] each."""
        trained = self._trained
        with sharding.on_mesh(trained.mesh, trained.rules):
            if inputs.shape[1] <= self._piece_length:
                return jax.device_get(self._whole(trained.params, *self._placed(inputs, targets)))
            state, found = self._start(*inputs.shape), []
            for start in range(0, inputs.shape[1], self._piece_length):
                where = np.s_[:, start : start + self._piece_length]
                scores, state = self._piece(trained.params, state, *self._placed(inputs[where], targets[where]))
                found.append(jax.device_get(scores))
        nll, likeliest = zip(*found, strict=True)
        return np.concatenate(nll, axis=1), np.concatenate(likeliest, axis=1)

    def _placed(self, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
        return jax.device_put(arrays, (self._trained.batch_sharding,) * len(arrays))


def _scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return token_nll(logits, targets), jnp.argmax(logits, -1) == targets
