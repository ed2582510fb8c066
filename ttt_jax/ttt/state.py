"""The hidden state of a TTT layer between two pieces of a sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt.learner import Weights


class InnerState(NamedTuple):
    """Where the inner loop stands, at any token.

    Attributes:
      weights: W at the start of the current mini-batch, leaves [B, H, ...], float32.
      pending: sum of token_eta[s] * gradient[s] over the tokens of the current mini-batch so far; the weights that
        token t used are ``weights - position_eta[t] * pending``. Zero at the start of a mini-batch.
      position: tokens read so far, int32 scalar.
    """

    weights: Weights
    pending: Weights
    position: jax.Array

    def advanced(self, pending: Weights, weights: Weights, tokens, full) -> "InnerState":
        """The state ``tokens`` later, where ``full`` (a traced bool) says whether the mini-batch has ended: if so it
        goes on from ``weights``, else ``pending`` grows."""
        return InnerState(
            jax.tree.map(lambda new, old: jnp.where(full, new, old), weights, self.weights),
            jax.tree.map(lambda p: jnp.where(full, 0.0, p), pending),
            self.position + tokens,
        )


def initial_state(w0: Weights, batch: int) -> InnerState:
    """The state before the first token of ``batch`` sequences: W0 ([H, ...] leaves) for each of them."""
    weights = jax.tree.map(lambda w: jnp.broadcast_to(w.astype(jnp.float32), (batch, *w.shape)), w0)
    return InnerState(weights, jax.tree.map(jnp.zeros_like, weights), jnp.zeros((), jnp.int32))
