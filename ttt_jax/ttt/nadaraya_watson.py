"""A Nadaraya-Watson estimator: a learner that keeps its data instead of weights. With this kernel it is attention.

    f(q) = sum_s kernel(q, k_s) v_s / sum_s kernel(q, k_s)        kernel(q, k) = exp(q . k / sqrt(d_k))

Writing a token and then reading it, token after token, is causal softmax attention exactly (Theorem 2 of the paper). It
has no weights, so none of the five choices of :mod:`ttt_jax.ttt.inner_loop` applies: it is the second kind of learner,
whose state is all that it has read and grows with the sequence. It says what attention is, not how to compute it fast.

Shapes: B batch, n tokens of this call, H heads, d_k and d_v widths of keys and values, capacity in tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Data(NamedTuple):
    """The state: every token written so far, and empty places after them."""

    k: jax.Array  # [B, capacity, H, d_k]
    v: jax.Array  # [B, capacity, H, d_v]
    written: jax.Array  # tokens, int32 scalar


def empty(batch: int, capacity: int, heads: int, d_k: int, d_v: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Data:
    """Return the state before the first token, with places for ``capacity`` tokens."""
    k, v = (jnp.zeros((batch, capacity, heads, d), dtype) for d in (d_k, d_v))
    return Data(k, v, jnp.zeros((), jnp.int32))


def write(state: Data, k: jax.Array, v: jax.Array) -> Data:
    """Add tokens, k [B, n, H, d_k] and v [B, n, H, d_v].

    Raises:
      ValueError: where they have another shape than the state or do not fit. In a traced program the number of tokens
        written is not known; what is read after too many is NaN there.
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
    """Return f(q), [B, n, H, d_k] to [B, n, H, d_v]: the mean of the values written, weighed by the kernel.

    NaN where nothing has been written, or more than fits.
    """
    capacity, d_k = state.k.shape[1], state.k.shape[-1]
    log_kernel = jnp.einsum("bqhd,bshd->bhqs", q, state.k) / d_k**0.5
    log_kernel = jnp.where(jnp.arange(capacity) < state.written, log_kernel, -jnp.inf)
    estimate = jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(log_kernel, -1), state.v)  # less the largest: no overflow
    return jnp.where(state.written <= capacity, estimate, jnp.nan)
