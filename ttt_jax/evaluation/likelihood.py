"""How likely a model finds the last tokens of texts, given those before them.

Texts are read side by side, padded to few lengths, so that few programs are compiled. One that is longer than the
training context is read in pieces of it, the state carried on: with all of its left context, in memory that does not
grow with it but by what the state holds.

Shapes: B texts at a time, T tokens.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.distributed import sharding
from ttt_jax.evaluation.trained import Trained
from ttt_jax.training.loss import token_nll

_SHORTEST = 32  # tokens that texts are padded to; longer ones to twice as many, four times, ...


class Text(NamedTuple):
    """Tokens [N], of which the last ``counted`` are to be predicted; the first one never is."""

    tokens: np.ndarray
    counted: int


class Score(NamedTuple):
    """Of the counted tokens of a text.

    Attributes:
      log_likelihood: sum, in nats.
      greedy: whether each of them is the likeliest one, so that greedy decoding would find them.
    """

    log_likelihood: float
    greedy: bool


class Scorer:
    """A trained model that scores texts; what it finds does not depend on the batch size.

    Args:
      batch_size: texts of the training context at a time, and as many more as they are shorter; None is about as many
        tokens as a training step has.
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
        """Scores texts, in any order of lengths.

        Args:
          progress: is called with the number of texts that have just been scored.
        """
        found: list[Score] = [Score(0.0, True)] * len(texts)
        by_length: dict[int, list[int]] = {}
        for i, text in enumerate(texts):
            by_length.setdefault(self._padded(len(text.tokens) - 1), []).append(i)
        for length in sorted(by_length, reverse=True):  # what needs most memory fails at once
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
        """A length of its own for few lengths: powers of two, then multiples of the training context."""
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
        """Loss, and whether the target is the likeliest token: [B, T] each."""
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
