"""Compute a Nadaraya-Watson estimator: a learner that stores its data instead of weights (Theorem 2 of the paper).

    f(q) = sum_s kernel(q, k_s) v_s / sum_s kernel(q, k_s)        kernel(q, k) = exp(q . k / sqrt(d_k))

Writing each token and then reading its query is exactly causal softmax attention. The estimator has no weights, so none
of the five choices of :mod:`ttt_jax.ttt.inner_loop` applies: its state is all tokens so far, and grows with the
sequence. It shows what attention is, not how to compute it fast.

Shapes: B batch, n tokens of this call, H heads, d_k and d_v widths of keys and values, capacity in tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Data(NamedTuple):
    """The state: every token written so far, followed by empty places."""

    k: jax.Array  # [B, capacity, H, d_k]
    v: jax.Array  # [B, capacity, H, d_v]
    written: jax.Array  # number of tokens written, int32 scalar


def empty(batch: int, capacity: int, heads: int, d_k: int, d_v: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Data:
    """Return the state before the first token, with room for ``capacity`` tokens."""
    k, v = (jnp.zeros((batch, capacity, heads, d), dtype) for d in (d_k, d_v))
    return Data(k, v, jnp.zeros((), jnp.int32))


def write(state: Data, k: jax.Array, v: jax.Array) -> Data:
    """Add tokens, k [B, n, H, d_k] and v [B, n, H, d_v].

    Raises:
      ValueError: where the shapes are not those of the state, or the tokens do not fit. In a traced program the number
        of tokens written is unknown; there, reading after too many returns NaN.
    """
    batch, capacity, heads, d_k = state.k.shape
    n, d_v = k.shape[1], state.v.shape[-1]
    if (k.shape, v.shape) != ((batch, n, heads, d_k), (batch, n, heads, d_v)):
        raise ValueError(
            f"k {k.shape} and v {v.shape}: expected ({batch}, n, {heads}, {d_k}) and ({batch}, n, {heads}, {d_v})"
        )
    known = 0 if isinstance(state.written, jax.core.Tracer) else int(state.written)
    if known + n > capacity:
        raise ValueError(f"{n} more tokens after {known} do not fit; expected at most {capacity} in all")
    places = state.written + jnp.arange(n)
    k, v = (old.at[:, places].set(new, mode="drop") for old, new in ((state.k, k), (state.v, v)))
    return Data(k, v, state.written + n)


def read(state: Data, q: jax.Array) -> jax.Array:
    """Return f(q), [B, n, H, d_k] to [B, n, H, d_v]: the mean of the values written, weighted by the kernel.

    The result is NaN where nothing has been written, or more than fits.
    """
    capacity, d_k = state.k.shape[1], state.k.shape[-1]
    log_kernel = jnp.einsum("bqhd,bshd->bhqs", q, state.k) / d_k**0.5  # [B, H, n, capacity]
    log_kernel = jnp.where(jnp.arange(capacity) < state.written, log_kernel, -jnp.inf)
    weights = jax.nn.softmax(log_kernel, -1)  # subtracts the largest logarithm first, so that nothing overflows
    estimate = jnp.einsum("bhqs,bshd->bqhd", weights, state.v)
    return jnp.where(state.written <= capacity, estimate, jnp.nan)
