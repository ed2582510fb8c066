"""Mini-batches of a group whose rows are (head, token), and numbers per token spread over hidden features.

Shapes: L tokens of the group, s heads of the pack, b tokens of a mini-batch, m hidden features in whole registers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.layout import LANES, Layout


def tile(layout: Layout, x: jax.Array, t: int) -> jax.Array:
    """Mini-batch t of rows, [s L, m] to [s b, m]."""
    b, tokens = layout.mini_batch, layout.group_tokens
    starts = [head * tokens + t * b for head in range(layout.pack)]
    return jnp.concatenate([x[i : i + b] for i in starts], 0)


def no_tiles(layout: Layout) -> list[Any]:
    """A place for each mini-batch of a group."""
    return [None] * layout.group


def join(layout: Layout, tiles: Sequence[jax.Array | None]) -> jax.Array:
    """Rows [s L, m] of mini-batches [s b, m]; zeros where there is none."""
    b = layout.mini_batch
    some = next(x for x in tiles if x is not None)
    nothing = jnp.zeros((b, some.shape[1]), some.dtype)
    tiles = [*tiles, *[None] * (layout.group - len(tiles))]
    return jnp.concatenate(
        [nothing if x is None else x[head * b : (head + 1) * b] for head in range(layout.pack) for x in tiles], 0
    )


def rows_of(layout: Layout, per_head: jax.Array) -> jax.Array:
    """What is the same for all tokens of a head, [s, m] to [s L, m]."""
    shape = (layout.group_tokens, per_head.shape[1])
    return jnp.concatenate([jnp.broadcast_to(per_head[i : i + 1], shape) for i in range(layout.pack)], 0)


def sum_per_head(layout: Layout, x: jax.Array) -> jax.Array:
    """The transpose of :func:`rows_of`."""
    tokens = layout.group_tokens
    return jnp.concatenate([x[i * tokens : (i + 1) * tokens].sum(0, keepdims=True) for i in range(layout.pack)], 0)


def over_hidden(x: jax.Array, width: int) -> jax.Array:
    """The same number in 128 lanes to as many lanes as there are hidden features."""
    return jnp.concatenate([x] * (width // LANES), 1)


def hidden_rates(layout: Layout, eta: jax.Array, width: int) -> jax.Array:
    """[L, s] to [s L, m]: the rate of a token for all its hidden features."""
    shape = (layout.group_tokens, width)
    return jnp.concatenate([jnp.broadcast_to(eta[:, i : i + 1], shape) for i in range(layout.pack)], 0)


def earlier(layout: Layout) -> jax.Array:
    """Pairs [L, s L]: whether the column is of a mini-batch before that of the row."""
    b, tokens = layout.mini_batch, layout.group_tokens
    shape = (tokens, layout.pack * tokens)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (column & (tokens - b)) < (row & (tokens - b))
