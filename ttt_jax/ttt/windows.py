"""Where the tokens of a piece are read, whatever is padding and wherever documents begin.

The tokens of a row are put into windows of c slots, in their order, those of a window into its first slots; padding has
no slot. No mini-batch lies in two windows. To that end the row's tokens are counted from the first place of the
mini-batch at hand, and the count is cut into cells of b. A mini-batch is then inside a cell or crosses into the next:

    what lies inside a cell       one mini-batch, or the last part of a document and documents after it that are shorter
                                  than b
    what crosses into the next    one mini-batch

Each of these that a row has is its next window. Mini-batches cross only after a document has begun in the middle of a
cell; where documents do not begin inside a piece, there are windows for whole cells only.

Shapes: B batch, T tokens of this piece, b tokens per mini-batch, n windows of c slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Windows(NamedTuple):
    """The tokens of a piece in windows."""

    source: jax.Array  # the token in each slot, T or more where it is empty, int32 [B, n, c]
    target: jax.Array  # the slot of each token among all n * c, n * c or more for padding, int32 [B, T]
    place: jax.Array  # of the token of each slot in its mini-batch, 0 where it is empty, int32 [B, n, c]
    begins: jax.Array | None  # whether a document begins with the slot, bool [B, n, c]; None where none begins
    position: jax.Array  # tokens of the present document that each row has read after the piece, int32 [B]

    @property
    def filled(self) -> jax.Array:
        """Whether there is a token in the slot, [B, n, c]."""
        return self.source < self.target.shape[1]

    def put(self, x: jax.Array) -> jax.Array:
        """Put what there is of each token into the slots, [B, T, ...] to [B, n * c, ...]; zeros in empty ones."""
        return _take(x, self.source.reshape(len(x), -1))

    def back(self, y: jax.Array) -> jax.Array:
        """Return what there is of each slot to the tokens, [B, n * c, ...] to [B, T, ...]; zeros for padding."""
        return _take(y, self.target)


def lay(
    tokens: int, b: int, position: jax.Array | None, valid: jax.Array | None = None, reset: jax.Array | None = None
) -> Windows:
    """Lay the tokens of a piece into windows.

    Args:
      tokens: T.
      position: tokens of the present document that each row has read before the piece, [B]; None where all rows are at
        the start of one.
      valid: whether each token is one, and not padding, [B, T]; None where all are.
      reset: whether a document begins with the token, [B, T]; None where none does.
    """
    rows = next(len(x) for x in (position, valid, reset) if x is not None)
    c, cells = min(b, tokens), -(-(tokens + (0 if position is None else b - 1)) // b)
    position = jnp.zeros(rows, jnp.int32) if position is None else position
    valid = jnp.ones((rows, tokens), bool) if valid is None else valid
    count = jnp.cumsum(valid, 1, dtype=jnp.int32)
    line = position[:, None] % b + count - 1  # [B, T], of each token from the first place of the mini-batch at hand
    end = line[:, -1:] + 1
    if reset is None:
        n, place, window = cells, line % b, line // b
        read = position + count[:, -1]
    else:
        n, reset = 2 * cells - 1, reset & valid
        first = jax.lax.cummax(jnp.where(reset, count, 0), axis=1)  # of the document, from 1; 0 before the piece
        place = jnp.where(first > 0, count - first, line) % b
        starts = jnp.where(valid & (place == 0), line, end)
        following = jax.lax.cummin(jnp.concatenate([starts[:, 1:], end], 1), axis=1, reverse=True)
        window = (line - place) // b + (following - 1) // b
        read = jnp.where(first[:, -1] > 0, count[:, -1] - first[:, -1] + 1, position + count[:, -1])
    before = jax.lax.cummax(jnp.where(valid, window, -1), axis=1)
    new = valid & (window != jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)[:, :-1])
    slot = line - jax.lax.cummax(jnp.where(new, line, 0), axis=1)
    window = jnp.cumsum(new, 1, dtype=jnp.int32) - 1  # without those that are empty: rows have theirs at the same time
    now = jnp.arange(tokens, dtype=jnp.int32)
    target = jnp.where(valid, window * c + slot, n * c + now)
    slots = jnp.broadcast_to(tokens + jnp.arange(n * c, dtype=jnp.int32), (rows, n * c))
    source = jax.vmap(lambda x, i: x.at[i].set(now, mode="drop", unique_indices=True))(slots, target)

    def put(x):
        return _take(x, source).reshape(rows, n, c)

    return Windows(source.reshape(rows, n, c), target, put(place), None if reset is None else put(reset), read)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return ``x[i, index[i, j]]``, zero where it is out of bounds; no index but those is there twice."""

    def row(x, index):
        return x.at[index].get(mode="fill", fill_value=0, unique_indices=True)

    return jax.vmap(row)(x, index)
