"""Define an inner loop: its five choices, its arrays and its state.

    learner     f, and its output            :mod:`ttt_jax.ttt.learner`, :mod:`ttt_jax.ttt.learners`
    objective   loss of f(k) and v           :mod:`ttt_jax.ttt.objective`
    rate        per token times position     :mod:`ttt_jax.ttt.rate`
    update      how gradients change W       :mod:`ttt_jax.ttt.update`
    reading     which W a token uses         ``causal`` or ``previous``

Shapes: B batch, T tokens, H heads, M weight matrices, d_k and d_v widths of keys and values, b tokens per mini-batch.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.ttt import learners, update
from ttt_jax.ttt.learner import Constants, Learner, Weights
from ttt_jax.ttt.objective import Objective, squared_error
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Chain

PAPER_RATE = Rate()
READINGS = ("causal", "previous")


@dataclasses.dataclass(frozen=True)
class InnerLoop:
    """One inner loop, as five choices. All else that computes it is the same code for all inner loops.

    Attributes:
      learner: f with the width of its inputs.
      objective: the self-supervised loss of f(k) and v.
      rate: how token_eta and position_eta are computed. The functions that run the inner loop take the results, as
        :class:`Tokens` and :class:`Parameters`.
      update: how gradients change the weights; the empty chain is gradient descent.
      reading: ``causal``: a token sees the steps of its mini-batch up to and including its own. ``previous``: all
        tokens of a mini-batch see the weights that it starts with, and its step is taken after it.
    """

    learner: Learner
    objective: Objective = squared_error
    rate: Rate = PAPER_RATE
    update: Chain = ()
    reading: str = "causal"

    def __post_init__(self):
        if self.reading not in READINGS:
            raise ValueError(f"reading {self.reading!r}: expected one of {', '.join(READINGS)}")
        if sum(isinstance(member, update.Decay) for member in self.update) > 1:
            raise ValueError("update: weights decay twice; expected at most one decay")
        if self.reading == "causal" and not update.is_linear(self.update):
            names = [type(member).__name__.lower() for member in self.update if not member.linear]
            raise ValueError(
                f"{' and '.join(names)} is not linear in the gradients, so for the reading 'causal' the steps inside a "
                "mini-batch have no closed form; expected the reading 'previous'"
            )


def ttt_linear(features: int) -> InnerLoop:
    """Return the inner loop of TTT-Linear."""
    return InnerLoop(learners.linear(features))


def ttt_mlp(features: int, *, depth: int = 2, width_factor: float = 4.0) -> InnerLoop:
    """Return the inner loop of TTT-MLP."""
    return InnerLoop(learners.mlp(features, depth=depth, width_factor=width_factor))


class Parameters(NamedTuple):
    """The arrays that the outer loop trains."""

    w0: Weights  # weights before the first token, leaves [H, ...], or [B, H, ...] where each sequence has its own
    constants: Constants  # parameters inside f that the inner loop does not change, [H, 1, n] each
    position_eta: jax.Array  # [b], the part of the rate that depends on the position; its length is the mini-batch b


class Tokens(NamedTuple):
    """The tokens of a piece of a sequence, in any float dtype."""

    q: jax.Array  # [B, T, H, d_k]
    k: jax.Array  # [B, T, H, d_k]
    v: jax.Array  # [B, T, H, d_v]
    eta: jax.Array  # [B, T, H] or [B, T, H, M], the part of the rate that depends on the token
    gates: dict[str, jax.Array] | None = None  # [B, T, H] each, by the gate of the member that reads it


class InnerState(NamedTuple):
    """The hidden state of a TTT layer between two pieces of a sequence, which may be cut at any token.

    Attributes:
      weights: W at the start of the current mini-batch, leaves [B, H, ...].
      pending: the gradient of the current mini-batch so far: the sum of token_eta[s] * gradient[s] over its tokens s,
        each decayed by the tokens after s. Zero at the start of a mini-batch; None only inside
        :mod:`ttt_jax.ttt.scan` and :mod:`ttt_jax.ttt.windows`.
      position: tokens of the current document read so far, int32 [B]; modulo b, the place in the current mini-batch.
      slots: the memory of each member of the update, at the start of the mini-batch.
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
    """Return the tree ``x`` in the rows where ``rows`` [B] is true, and ``y`` in the others; leaves [B, ...]."""

    def leaf(x, y):
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(leaf, x, y)
