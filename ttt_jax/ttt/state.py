"""The hidden state of a TTT layer between two pieces of a sequence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import update
from ttt_jax.ttt.learner import Weights
from ttt_jax.ttt.update import Chain


class InnerState(NamedTuple):
    """Where the inner loop stands in each sequence, at any token.

    Attributes:
      weights: W at the start of the current mini-batch, leaves [B, H, ...].
      pending: the sum of token_eta[s] * gradient[s] over the tokens of the current mini-batch so far, each decayed by
        those after it. Zero at the start of a mini-batch; None only inside :mod:`ttt_jax.ttt.scan`.
      position: tokens of the present document read so far, int32 [B]; modulo b, the place in the current mini-batch.
      slots: what each member of the update remembers, as of the start of the mini-batch.
      gates: the sum of each gate over the tokens of the current mini-batch so far, [B, H].
    """

    weights: Weights
    pending: Weights | None
    position: jax.Array
    slots: tuple[Any, ...] = ()
    gates: dict[str, jax.Array] | None = None


def initial_state(w0: Weights, batch: int, chain: Chain = ()) -> InnerState:
    """Return the state before the first token of ``batch`` sequences.

    Args:
      w0: leaves [H, ...], or [B, H, ...] where each sequence has its own.
      chain: the update.
    """

    def broadcast(w):
        return jnp.broadcast_to(w.astype(jnp.promote_types(w.dtype, jnp.float32)), (batch, *w.shape[-3:]))

    weights = jax.tree.map(broadcast, w0)
    first = weights[0].weight
    gates = {member.gate: jnp.zeros(first.shape[:2], first.dtype) for member in chain if member.gate}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return InnerState(weights, zeros, jnp.zeros(batch, jnp.int32), update.init(chain, weights), gates)


def where(rows: jax.Array, x: Any, y: Any) -> Any:
    """Return the tree ``x`` for some of the rows, [B], and ``y`` for the others; leaves [B, ...]."""

    def leaf(x, y):
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(leaf, x, y)
