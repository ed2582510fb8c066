"""Compute the inner loop in the primal form: token after token, with gradients by autodiff and every W_t formed.

This is the definition that the dual form must equal, for every learner, objective, rate, update and reading. With W the
weights that the mini-batch of token t starts with, p_t the rate of its position, eta_s the rate of token s, and the
sum over the tokens s of the mini-batch up to t (mini-batch TTT in the paper; online TTT for mini-batches of one token),

    W_t = W - p_t sum_{s <= t} eta_s grad loss(W; k_s, v_s)          z_t = f(q_t; W_t)

and the next mini-batch starts with W_b. :mod:`ttt_jax.ttt.update` has the equations with decay, momentum and so on.

Shapes: B batch, T tokens, H heads, b tokens per mini-batch, d_k and d_v widths of keys and values.
"""

import jax
import jax.numpy as jnp

from ttt_jax.ttt import update
from ttt_jax.ttt.inner_loop import InnerLoop, InnerState, Parameters, Tokens, initial_state, where
from ttt_jax.ttt.learner import Dense
from ttt_jax.ttt.update import Gate


def run(
    loop: InnerLoop,
    parameters: Parameters,
    tokens: Tokens,
    state: InnerState,
    valid: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, InnerState]:
    """Read a piece of a sequence, which may begin and end anywhere in a mini-batch.

    Args:
      state: the state after the tokens before the piece; :func:`~ttt_jax.ttt.inner_loop.initial_state` for none.
      valid: bool [B, T], false at padding, which changes nothing and where z is 0; None for no padding.
      reset: bool [B, T], true at the first token of a document, which starts at W0; None for no such token.

    Returns:
      z [B, T, H, d_v] and the state after the last token.
    """
    w0, constants, position_eta = parameters
    b, chain, causal = len(position_eta), loop.update, loop.reading == "causal"
    decay = update.decay_of(chain)
    start_of_sequence = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(tokens.q), *w.shape[-3:])), w0)

    def total_loss(weights, k, v):
        return loop.objective(loop.learner.f(Dense(weights, constants), k), v).sum()

    fresh = initial_state(w0, len(tokens.q), chain)

    def token(given: InnerState, xs):
        now, valid, reset = xs
        state = where(valid & reset, fresh, given)
        place = state.position % b
        totals = {name: total + now.gates[name][..., 0, 0] for name, total in (state.gates or {}).items()}
        count = place[:, None, None, None] + 1
        gates = {name: Gate(now.gates[name], total[..., None, None], count) for name, total in totals.items()}

        def shrunk(by, weights):  # the weights times exp(by(gate of the decay))
            return weights if decay is None else jax.tree.map(lambda w: jnp.exp(by(gates[decay.gate])) * w, weights)

        used = update.used_weights(chain, state.weights, start_of_sequence)
        at = shrunk(lambda gate: gate.total, used) if causal else used
        gradient = jax.grad(total_loss)(at, now.k, now.v)
        rates = [now.eta[..., i % now.eta.shape[-1], None] for i in range(len(gradient))]
        step = tuple(jax.tree.map(lambda g, r=r: r * g, g) for r, g in zip(rates, gradient, strict=True))
        pending = jax.tree.map(jnp.add, shrunk(lambda gate: gate.value, state.pending), step)
        rate = position_eta[place][:, None, None, None]
        stepped, slots = update.step(chain, state.weights, state.slots, pending, gates, rate, start_of_sequence)
        reads = update.used_weights(chain, stepped, start_of_sequence) if causal else used
        z = loop.learner.apply(reads, constants, now.q)

        full = place == b - 1
        after = InnerState(
            stepped, jax.tree.map(jnp.zeros_like, pending), state.position, slots, jax.tree.map(jnp.zeros_like, totals)
        )
        inside = state._replace(pending=pending, gates=totals)
        new = where(full, after, inside)._replace(position=state.position + 1)
        return where(valid, new, given), where(valid, z, jnp.zeros_like(z))

    dtype = jnp.promote_types(w0[0].weight.dtype, jnp.float32)

    def token_first(x):  # [B, T, H, ...] -> [T, B, H, 1, ...]
        return jnp.expand_dims(x.astype(dtype).swapaxes(0, 1), 3)

    gates = update.gates_per_token(chain, tokens.gates or {}, tokens.eta.astype(dtype))
    eta = tokens.eta if tokens.eta.ndim == 4 else tokens.eta[..., None]
    by_token = {name: token_first(gate[..., None]) for name, gate in gates.items()}
    xs = Tokens(token_first(tokens.q), token_first(tokens.k), token_first(tokens.v), token_first(eta), by_token)
    everywhere = jnp.ones(tokens.q.shape[:2], bool)
    valid = everywhere if valid is None else valid
    reset = ~everywhere if reset is None else reset
    state, z = jax.lax.scan(token, state, (xs, valid.T, reset.T))
    return z[..., 0, :].swapaxes(0, 1).astype(tokens.q.dtype), state
