"""Lay the tokens of a piece into windows, wherever there is padding and wherever documents begin.

The tokens of a row go into windows of c slots, in their order, and fill the first slots of each window; padding gets no
slot. No mini-batch is split between two windows. To find the windows, count the tokens of the row from place 0 of its
current mini-batch, and cut the count into cells of b tokens. Each row then has up to two windows per cell, in order:

    the tokens inside the cell                 one mini-batch, or the end of a document and then documents of fewer than
                                               b tokens
    a mini-batch that reaches into the next    one mini-batch

Mini-batches reach into the next cell only after a document has begun inside a cell. Where no document begins inside the
piece, there is one window per cell.

Shapes: B batch, T tokens of this piece, b tokens per mini-batch, n windows of c slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Windows(NamedTuple):
    """The tokens of a piece in windows."""

    source: jax.Array  # the token in each slot, T or more in an empty slot, int32 [B, n, c]
    target: jax.Array  # the slot of each token among all n * c slots, n * c or more for padding, int32 [B, T]
    place: jax.Array  # the place in its mini-batch of the token in each slot, 0 in an empty slot, int32 [B, n, c]
    begins: jax.Array | None  # whether a document begins with the token in the slot, bool [B, n, c]; None: in no slot
    position: jax.Array  # tokens of its current document that each row has read after the piece, int32 [B]

    @property
    def filled(self) -> jax.Array:
        """Return whether each slot holds a token, bool [B, n, c]."""
        return self.source < self.target.shape[1]

    def put(self, x: jax.Array) -> jax.Array:
        """Put an array of tokens into the slots, [B, T, ...] to [B, n * c, ...]; empty slots get zeros."""
        return _take(x, self.source.reshape(len(x), -1))

    def back(self, y: jax.Array) -> jax.Array:
        """Put an array of slots back in the order of the tokens, [B, n * c, ...] to [B, T, ...]; padding gets zeros."""
        return _take(y, self.target)


def lay(
    tokens: int, b: int, position: jax.Array | None, valid: jax.Array | None = None, reset: jax.Array | None = None
) -> Windows:
    """Lay the tokens of a piece into windows.

    Args:
      tokens: T.
      position: tokens of its current document that each row has read before the piece, [B]; None where all rows are at
        the start of a document.
      valid: bool [B, T], false at padding; None for no padding.
      reset: bool [B, T], true at the first token of a document; None for no such token.
    """
    rows = next(len(x) for x in (position, valid, reset) if x is not None)
    c, cells = min(b, tokens), -(-(tokens + (0 if position is None else b - 1)) // b)
    position = jnp.zeros(rows, jnp.int32) if position is None else position
    valid = jnp.ones((rows, tokens), bool) if valid is None else valid
    count = jnp.cumsum(valid, 1, dtype=jnp.int32)
    line = position[:, None] % b + count - 1  # [B, T], tokens from place 0 of the current mini-batch to each token
    end = line[:, -1:] + 1
    if reset is None:
        n, place, window = cells, line % b, line // b
        read = position + count[:, -1]
    else:
        n, reset = 2 * cells - 1, reset & valid
        # [B, T], the count, from 1, of the first token of the document of each token; 0 if that is before the piece.
        first = jax.lax.cummax(jnp.where(reset, count, 0), axis=1)
        place = jnp.where(first > 0, count - first, line) % b
        starts = jnp.where(valid & (place == 0), line, end)
        following = jax.lax.cummin(jnp.concatenate([starts[:, 1:], end], 1), axis=1, reverse=True)
        window = (line - place) // b + (following - 1) // b
        read = jnp.where(first[:, -1] > 0, count[:, -1] - first[:, -1] + 1, position + count[:, -1])
    before = jax.lax.cummax(jnp.where(valid, window, -1), axis=1)
    new = valid & (window != jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)[:, :-1])
    slot = line - jax.lax.cummax(jnp.where(new, line, 0), axis=1)
    # [B, T], the window of each token without counting empty windows, so that rows have theirs at the same time.
    window = jnp.cumsum(new, 1, dtype=jnp.int32) - 1
    now = jnp.arange(tokens, dtype=jnp.int32)
    target = jnp.where(valid, window * c + slot, n * c + now)
    slots = jnp.broadcast_to(tokens + jnp.arange(n * c, dtype=jnp.int32), (rows, n * c))
    source = jax.vmap(lambda x, i: x.at[i].set(now, mode="drop", unique_indices=True))(slots, target)

    def put(x):
        return _take(x, source).reshape(rows, n, c)

    return Windows(source.reshape(rows, n, c), target, put(place), None if reset is None else put(reset), read)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return ``x[i, index[i, j]]``, zero where the index is out of bounds; indices within bounds must be unique."""

    def row(x, index):
        return x.at[index].get(mode="fill", fill_value=0, unique_indices=True)

    return jax.vmap(row)(x, index)
