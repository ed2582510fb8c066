"""``lax.scan`` over mini-batches, with a choice of what is kept for the backward pass.

Shapes: B batch, H heads, n mini-batches of b tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def grouped_scan(step: Callable, carry: Any, xs: Any, group: int, unroll: int):
    """Scan over n mini-batches like ``lax.scan``; store the carry every ``group`` of them for the backward pass."""

    def scan(carry, xs):
        return jax.lax.scan(step, carry, xs, unroll=unroll)

    if not group:
        return scan(carry, xs)
    if group == 1:
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), carry, xs, unroll=unroll)
    n = len(jax.tree.leaves(xs)[0])
    n_groups = n // group
    remat_scan = jax.checkpoint(scan, prevent_cse=False)
    parts = []
    if n_groups:
        grouped = jax.tree.map(lambda x: x[: n_groups * group].reshape(n_groups, group, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(remat_scan, carry, grouped)
        parts.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
    if n % group:
        carry, ys = jax.checkpoint(scan)(carry, jax.tree.map(lambda x: x[n_groups * group :], xs))
        parts.append(ys)
    return carry, parts[0] if len(parts) == 1 else jax.tree.map(lambda *y: jnp.concatenate(y), *parts)


def split(x: jax.Array, b: int) -> jax.Array:
    """Return tokens by mini-batch, [B, n * b, H, d] to [n, B, H, b, d]."""
    batch, tokens, heads, d = x.shape
    return x.reshape(batch, tokens // b, b, heads, d).transpose(1, 0, 3, 2, 4)


def join_outputs(ys):
    """Return what there is of each token, a tree, in their order, [n, B, H, b, ...] to [B, n * b, H, ...]."""

    def join(y):
        n, batch, heads, b, *rest = y.shape
        return jnp.moveaxis(y, (1, 3), (0, 2)).reshape(batch, n * b, heads, *rest)

    return jax.tree.map(join, ys)
