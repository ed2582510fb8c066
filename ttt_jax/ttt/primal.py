"""The inner loop in primal form: one token after another, gradients by autodiff, every W_t formed.

The definition that the dual form must equal, and the cheaper way for a single token, as in decoding.

Shapes: B batch, T tokens, H heads, b tokens per mini-batch, d head width.
"""

import jax
import jax.numpy as jnp

from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt.learner import LayerNormParams, Learner
from ttt_jax.ttt.state import InnerState


def run(
    learner: Learner,
    norm: LayerNormParams,
    state: InnerState,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    token_eta: jax.Array,
    position_eta: jax.Array,
) -> tuple[jax.Array, InnerState]:
    """A piece of a sequence, from any position in a mini-batch to any other.

    Args:
      q, k, v: [B, T, H, d], after RoPE.
      token_eta: [B, T, H].
      position_eta: [b]; its length is the size of a mini-batch.

    Returns:
      z [B, T, H, d] and the state after the last token.
    """
    b = len(position_eta)

    def total_loss(weights, k, v):
        return learner_lib.loss(learner, norm, weights, k, v).sum()

    def token(state: InnerState, inputs):
        q, k, v, eta = inputs  # [B, H, 1, d] three times, [B, H, 1, 1]
        gradient = jax.grad(total_loss)(state.weights, k, v)
        pending = jax.tree.map(lambda p, g: p + eta * g, state.pending, gradient)
        place = state.position % b
        weights = learner_lib.gradient_step(state.weights, pending, position_eta[place])
        z = learner_lib.apply(learner, norm, weights, q)
        return state.advanced(pending, weights, 1, place == b - 1), z

    def token_first(x):  # [B, T, H, d] -> [T, B, H, 1, d]
        return x.astype(jnp.float32).swapaxes(0, 1)[..., None, :]

    xs = (token_first(q), token_first(k), token_first(v), token_first(token_eta[..., None]))
    state, z = jax.lax.scan(token, state, xs)
    return z[..., 0, :].swapaxes(0, 1).astype(q.dtype), state
