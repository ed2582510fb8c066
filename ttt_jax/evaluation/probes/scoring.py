"""Score candidate answers to a prompt by their likelihood.

Prompts are read in pieces, the state carried from one to the next, so that memory grows with the context only by what
the state holds. Then each candidate is read from the state behind the prompt.

Shapes: B examples side by side, T tokens of an example, C candidates, A tokens of the longest one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.distributed import sharding
from ttt_jax.evaluation.probes.prompt import Example
from ttt_jax.evaluation.trained import Trained


class Scores(NamedTuple):
    """The scores of N examples of C candidates.

    Attributes:
      log_likelihood: [N, C], the sum over the tokens of a candidate, in nats.
      matched: [N], whether each token of the answer is the likeliest one; meaningless where the ``log_likelihood`` of
        the answer is NaN or infinite.
    """

    log_likelihood: np.ndarray
    matched: np.ndarray


class Scorer:
    """A trained model that scores answers.

    Args:
      piece_length: tokens per piece; by default, the context of training.
      batch_size: examples per batch, rounded up to a multiple of ``trained.rows``.
    """

    def __init__(self, trained: Trained, *, batch_size: int, piece_length: int | None = None):
        self._trained = trained
        self._batch_size = -(-batch_size // trained.rows) * trained.rows
        self._piece_length = piece_length or trained.config.data.sequence_length
        model = trained.model

        @functools.partial(jax.jit, donate_argnums=1)
        def read(params, state, tokens):
            return model.apply({"params": params}, tokens, state)[1]

        @jax.jit
        def answer(params, state, inputs, targets, mask):
            logits, _ = model.apply({"params": params}, inputs, state)
            found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
            # Greedy decoding gives the answer if and only if each of its tokens is the likeliest one after the true
            # tokens before it: the first token that is not would be the first that decoding gets wrong.
            likeliest = (logits.argmax(-1) == targets) | (mask == 0)
            return jnp.where(mask > 0, found, 0).sum(-1), likeliest.all(-1)

        self._read, self._answer = read, answer
        self._start = jax.jit(lambda length: model.initial_state(self._batch_size, length), static_argnums=0)

    def score(self, examples: Sequence[Example], progress: Callable[[int], None] = lambda done: None) -> Scores:
        """Score examples of one context.

        Args:
          progress: called with the number of examples scored so far.
        """
        longest = max(len(candidate) for example in examples for candidate in example.candidates)
        found = []
        for first in range(0, len(examples), self._batch_size):
            group = examples[first : first + self._batch_size]
            found.append(self._of_batch(group, -(-longest // 8) * 8))  # few lengths, so that few programs are compiled
            progress(first + len(group))
        return Scores(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _of_batch(self, group: Sequence[Example], longest: int) -> Scores:
        rows = [*group, *[group[-1]] * (self._batch_size - len(group))]
        tokens = np.stack([example.tokens for example in rows])  # [B, T]
        # Answers end at T and begin at different positions; the tokens before all of them are read once.
        common = max(0, tokens.shape[1] - longest - 1)
        with sharding.on_mesh(self._trained.mesh, self._trained.rules):
            state = self._start(common + 2 * longest)
            for start in range(0, common, self._piece_length):
                piece = tokens[:, start : min(start + self._piece_length, common)]
                state = self._read(self._trained.params, state, self._on_devices(piece))
            scores = [self._candidate(rows, state, i, common, longest) for i in range(len(rows[0].candidates))]
        log_likelihood = np.stack([np.asarray(total) for total, _ in scores], 1)
        return Scores(log_likelihood[: len(group)], np.asarray(scores[0][1])[: len(group)])

    def _candidate(self, rows: Sequence[Example], state, index: int, common: int, longest: int):
        """Return the log-likelihood [B] of candidate ``index``, and whether all of its tokens are the likeliest [B]."""
        shape = len(rows), 2 * longest
        inputs, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, example in enumerate(rows):
            answer = example.candidates[index]
            prompt = example.tokens[common : len(example.tokens) - len(example.candidates[0])]
            tail = np.concatenate([prompt, answer])
            n = len(tail) - 1
            inputs[row, :n], targets[row, :n] = tail[:-1], tail[1:]
            mask[row, len(prompt) - 1 : n] = 1
        return self._answer(self._trained.params, state, *map(self._on_devices, (inputs, targets, mask)))

    def _on_devices(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._trained.batch_sharding)
