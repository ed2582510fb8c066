"""Tell layers that mix tokens about padding and beginnings of documents, and compute the position of each token.

A sequence may be read in several pieces, with a state between them.

Shapes: B batch, T tokens of this piece.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Context:
    """The input of a mixer beside x.

    Attributes:
      valid: bool [B, T]; tokens that are not valid are padding and change nothing. None: all are valid.
      reset: bool [B, T]; a valid token with a reset begins a document, and reads nothing before it. None: no token
        begins a document.
      inner_lr_warmup: progress of the warm-up of inner learning rates, from 0 to 1.
      aligned: a promise that all tokens are valid, and that states and resets are at multiples of the mini-batch of
        mixers that have one, which makes them faster. Where the promise is broken, results are NaN.
    """

    valid: jax.Array | None = None
    reset: jax.Array | None = None
    inner_lr_warmup: jax.Array | float = 1.0
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def begins(self) -> jax.Array | None:
        """Return where documents begin, [B, T]: the resets of valid tokens."""
        return self.reset if self.reset is None or self.valid is None else self.reset & self.valid

    def blank(self, y: jax.Array) -> jax.Array:
        """Return y [B, T, ...] with zeros at padding."""
        return y if self.valid is None else _blank(y, self.valid)


PLAIN = Context()  # whole sequences of one document, without padding


class Places(NamedTuple):
    """The positions of the tokens of a piece.

    Attributes:
      position: [B, T], the number of valid tokens of the same document before a valid token.
      document: [B, T], the index of the token's document within the piece; 0 is the document that the state is of.
      end: [B], the position of the next token after the piece, unless it begins a document.
    """

    position: jax.Array
    document: jax.Array
    end: jax.Array


def places(context: Context, tokens: int, start: jax.Array | None) -> Places | None:
    """Return the places of the tokens of a piece; None where the position of token t is t in every row.

    Args:
      context: padding and beginnings of documents.
      tokens: T.
      start: [B], the number of tokens of its document that each row has read before; None: whole sequences.
    """
    valid, begins = context.valid, context.begins
    rows = next((x for x in (valid, begins) if x is not None), None)
    if start is None:
        if rows is None:
            return None
        start = jnp.zeros(len(rows), jnp.int32)
    shape = len(start), tokens
    if valid is None:
        before = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), shape)  # [B, T] valid tokens in the piece
    else:
        before = jnp.cumsum(valid, 1, dtype=jnp.int32) - valid
    if begins is None:
        position, document = start[:, None] + before, jnp.zeros(shape, jnp.int32)
    else:
        first = jax.lax.cummax(jnp.where(begins, before, -start[:, None]), axis=1)  # [B, T] where the document begins
        position, document = before - first, jnp.cumsum(begins, 1, dtype=jnp.int32)
    return Places(position, document, position[:, -1] + (1 if valid is None else valid[:, -1]))


class Gathered(NamedTuple):
    """An order in which the valid tokens of each row come first, followed by padding.

    Attributes:
      context: the context of the tokens in this order.
      counts: [B], the number of valid tokens.
      valid: [B, T], the valid tokens in the original order.
    """

    context: Context
    counts: jax.Array
    valid: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """Return x [B, T, ...] in this order."""
        return pick(x, jnp.argsort(~self.valid, axis=1, stable=True))

    def back(self, y: jax.Array) -> jax.Array:
        """Return y [B, T, ...] in the original order, with zeros at padding."""
        place = jnp.cumsum(self.valid, 1, dtype=jnp.int32) - 1
        return _blank(pick(y, jnp.maximum(place, 0)), self.valid)


def gather_valid(valid: jax.Array, context: Context) -> Gathered:
    """Return the order with padding behind the valid tokens of each row; ``valid`` is ``context.valid``."""
    counts = jnp.sum(valid, 1, dtype=jnp.int32)
    gathered = Gathered(context, counts, valid)
    left = jnp.arange(valid.shape[1]) < counts[:, None]
    reset = None if context.reset is None else gathered.take(context.reset) & left
    return gathered._replace(context=dataclasses.replace(context, valid=left, reset=reset))


def _blank(y: jax.Array, valid: jax.Array) -> jax.Array:
    return jnp.where(valid.reshape(*valid.shape, *[1] * (y.ndim - 2)), y, 0)


def pick(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Return ``x[b, indices[b]]``, [B, S, ...] and [B, T] to [B, T, ...]."""
    return jax.vmap(lambda x, i: x[i])(x, indices)
