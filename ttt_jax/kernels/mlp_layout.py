"""Lay out and multiply the arrays of TTT-MLP, for all heads of a pack at once.

Arrays have one of three orders:

- *compact* [L, 128]: rows are tokens, and lanes are the features of the heads, side by side;
- *rows* [s L, m]: rows are (head, token), for hidden features, which do not fit side by side;
- *pairs* [L, s L]: rows are tokens, and columns are (head, token), with the heads in reverse order.

A head of 64 features leaves half of a pass of 128 x 128 through a matrix unit empty, and so do 64 tokens. With the
heads of pairs in reverse order, the lanes that a head leaves free in compact are the lanes of its pairs, and

    x w + e y = [x e] [w; y]               z [w; y]^T = [z w^T, z y^T]

are one full pass each instead of two; selections put the operands together, which move nothing from lane to lane.

Shapes: L tokens of the group, s heads of the pack, m hidden features; rows can be those of one mini-batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.layout import LANES, Layout
from ttt_jax.kernels.ops import Numerics, dot, stack_heads, unstack_heads


def swap(layout: Layout, x: jax.Array) -> jax.Array:
    """Reverse the order of the heads in rows."""
    return jnp.concatenate(by_head(layout, x)[::-1], 0) if layout.pack > 1 else x


def by_head(layout: Layout, x: jax.Array) -> list[jax.Array]:
    """Split rows by head."""
    rows = x.shape[0] // layout.pack
    return [x[head * rows : (head + 1) * rows] for head in range(layout.pack)]


def stack_swapped(layout: Layout, x: jax.Array) -> jax.Array:
    """Stack compact [L, 128] to [s L, 128], in the order of the columns of pairs."""
    return swap(layout, stack_heads(layout, x))


def unstack_swapped(layout: Layout, x: jax.Array) -> jax.Array:
    """Apply the transpose of :func:`stack_swapped`."""
    return unstack_heads(layout, swap(layout, x))


def apart(layout: Layout, e: jax.Array) -> jax.Array:
    """Repeat pairs for each head, [rows, s L] to [s * rows, s L], with zeros in the columns of the other heads."""
    if layout.pack == 1:
        return e
    return jnp.concatenate([jnp.where(_slot(layout.pack - 1 - head), e, 0.0) for head in range(layout.pack)], 0)


def product(x: jax.Array, e: jax.Array, w: jax.Array, y: jax.Array, numerics: Numerics) -> jax.Array:
    """Return ``x w + e y`` per head, in rows, for compact x, pairs e, w [128, m] and rows y [s L, m]."""
    layout, operands = numerics
    if layout.pack == 1:
        return dot(x, w, "nn", operands) + dot(e, y, "nn", operands)
    left = jnp.where(_slot(0), x, e), jnp.where(_slot(0), e, x)
    return jnp.concatenate(
        [dot(a, b, "nn", operands) for a, b in zip(left, _one_below_the_other(w, y, numerics), strict=True)], 0
    )


def products(z: jax.Array, w: jax.Array, y: jax.Array, numerics: Numerics) -> tuple[jax.Array, jax.Array]:
    """Return ``z w^T``, compact, and ``z y^T``, in pairs, per head, for rows z, w [128, m] and rows y [s L, m]."""
    layout, operands = numerics
    if layout.pack == 1:
        return dot(z, w, "nt", operands), dot(z, y, "nt", operands)
    right = _one_below_the_other(w, y, numerics)
    first, second = (dot(a, b, "nt", operands) for a, b in zip(by_head(layout, z), right, strict=True))
    return jnp.where(_slot(0), first, second), jnp.where(_slot(0), second, first)


def transposed_product(xs: Sequence[jax.Array], ys: Sequence[jax.Array], numerics: Numerics) -> jax.Array:
    """Return the sum of ``x^T y`` per head, [128, m], for compact xs and rows ys; two of 64 tokens fill a pass."""
    layout, operands = numerics
    left = jnp.concatenate(xs, 0).astype(operands).T
    right = zip(*(by_head(layout, y) for y in ys), strict=True)
    return jnp.concatenate(
        [dot(a, jnp.concatenate(y, 0), "nn", operands) for a, y in zip(by_head(layout, left), right, strict=True)],
        0,
    )


def _one_below_the_other(w, y, numerics):
    """Put w and y of each of two heads one below the other, the rows of w at the lanes of the head."""
    layout, operands = numerics
    (w0, w1), (y0, y1) = (by_head(layout, x.astype(operands)) for x in (w, y))
    return jnp.concatenate([w0, y0], 0), jnp.concatenate([y1, w1], 0)


def _slot(head: int) -> jax.Array:
    """Return whether each lane is in the half of a head, [1, 128]."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return (lane < LANES // 2) if head == 0 else (lane >= LANES // 2)


def tile(layout: Layout, x: jax.Array, t: int) -> jax.Array:
    """Return mini-batch t of rows, [s L, m] to [s b, m]."""
    b, tokens = layout.mini_batch, layout.group_tokens
    starts = [head * tokens + t * b for head in range(layout.pack)]
    return jnp.concatenate([x[i : i + b] for i in starts], 0)


def no_tiles(layout: Layout) -> list[Any]:
    """Return a list of None, one for each mini-batch of a group."""
    return [None] * layout.group


def join(layout: Layout, tiles: Sequence[jax.Array | None]) -> jax.Array:
    """Join mini-batches [s b, m] to rows [s L, m], with zeros for None and for those that are missing at the end."""
    b = layout.mini_batch
    some = next(x for x in tiles if x is not None)
    nothing = jnp.zeros((b, some.shape[1]), some.dtype)
    tiles = [*tiles, *[None] * (layout.group - len(tiles))]
    return jnp.concatenate(
        [nothing if x is None else x[head * b : (head + 1) * b] for head in range(layout.pack) for x in tiles], 0
    )


def repeat_per_token(layout: Layout, per_head: jax.Array) -> jax.Array:
    """Repeat a row of each head for all of its tokens, [s, m] to [s L, m]."""
    shape = (layout.group_tokens, per_head.shape[1])
    return jnp.concatenate([jnp.broadcast_to(per_head[i : i + 1], shape) for i in range(layout.pack)], 0)


def sum_per_head(layout: Layout, x: jax.Array) -> jax.Array:
    """Apply the transpose of :func:`repeat_per_token`, [s L, m] to [s, m]."""
    tokens = layout.group_tokens
    return jnp.concatenate([x[i * tokens : (i + 1) * tokens].sum(0, keepdims=True) for i in range(layout.pack)], 0)


def over_hidden(x: jax.Array, width: int) -> jax.Array:
    """Repeat 128 equal lanes to the number of lanes of the hidden features."""
    return jnp.concatenate([x] * (width // LANES), 1)


def hidden_rates(layout: Layout, eta: jax.Array, width: int) -> jax.Array:
    """Repeat the rate of each token for all of its hidden features, [L, s] to [s L, m]."""
    shape = (layout.group_tokens, width)
    return jnp.concatenate([jnp.broadcast_to(eta[:, i : i + 1], shape) for i in range(layout.pack)], 0)


def earlier(layout: Layout) -> jax.Array:
    """Return whether the mini-batch of the column is before that of the row, in pairs [L, s L]."""
    b, tokens = layout.mini_batch, layout.group_tokens
    shape = (tokens, layout.pack * tokens)
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (column & (tokens - b)) < (row & (tokens - b))
