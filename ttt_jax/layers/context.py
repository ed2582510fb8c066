"""What layers that mix tokens are told beside their input: padding and beginnings of documents, and where that puts
each token.

Shapes: B batch, T tokens of this piece.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Context:
    """What a mixer may want to know beside its input.

    Attributes:
      valid: bool [B, T]; tokens that are not valid are padding and change nothing. None: all are valid.
      reset: bool [B, T]; a valid token with a reset begins a document, and reads nothing of what is before it. None: no
        token does.
      inner_lr_warmup: how far the warm-up of inner learning rates has come, from 0 to 1.
      aligned: a promise that all tokens are valid, and that states and resets are at multiples of the mini-batch of
        mixers that have one, which is faster. Where it is broken, results are NaN.
    """

    valid: jax.Array | None = None
    reset: jax.Array | None = None
    inner_lr_warmup: jax.Array | float = 1.0
    aligned: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def begins(self) -> jax.Array | None:
        """Where documents begin, [B, T]: the resets of tokens that are valid."""
        return self.reset if self.reset is None or self.valid is None else self.reset & self.valid

    def blank(self, y: jax.Array) -> jax.Array:
        """Return y [B, T, ...] with zeros at padding."""
        return y if self.valid is None else _blank(y, self.valid)


PLAIN = Context()  # whole sequences of one document, without padding


class Places(NamedTuple):
    """Where the tokens of a piece stand.

    Attributes:
      position: [B, T], of a valid token: how many valid tokens of its document are before it.
      document: [B, T], the number of the token's document within the piece; 0 is the one that the state is of.
      end: [B], the position of the token after the piece if it does not begin a document.
    """

    position: jax.Array
    document: jax.Array
    end: jax.Array


def places(context: Context, tokens: int, start: jax.Array | None) -> Places | None:
    """Return where the ``tokens`` of a piece stand that follows ``start`` [B] tokens of a document, or begins one.

    None stands for whole sequences of one document without padding, where the position of token t is t.
    """
    valid, begins = context.valid, context.begins
    rows = next((x for x in (valid, begins) if x is not None), None)
    if start is None:
        if rows is None:
            return None
        start = jnp.zeros(len(rows), jnp.int32)
    shape = len(start), tokens
    if valid is None:
        before = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), shape)  # valid tokens of the piece
    else:
        before = jnp.cumsum(valid, 1, dtype=jnp.int32) - valid
    if begins is None:
        position, document = start[:, None] + before, jnp.zeros(shape, jnp.int32)
    else:
        first = jax.lax.cummax(jnp.where(begins, before, -start[:, None]), axis=1)  # where the document begins
        position, document = before - first, jnp.cumsum(begins, 1, dtype=jnp.int32)
    return Places(position, document, position[:, -1] + (1 if valid is None else valid[:, -1]))


class Gathered(NamedTuple):
    """The valid tokens of each row side by side from its beginning, and how to take them back.

    Attributes:
      context: of the tokens as they are now; padding is behind all others.
      counts: [B], how many are valid.
      valid: [B, T], which were.
    """

    context: Context
    counts: jax.Array
    valid: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """Return x [B, T, ...] in the new order."""
        return pick(x, jnp.argsort(~self.valid, axis=1, stable=True))

    def back(self, y: jax.Array) -> jax.Array:
        """Return y [B, T, ...] in the order of before, with zeros at padding."""
        place = jnp.cumsum(self.valid, 1, dtype=jnp.int32) - 1
        return _blank(pick(y, jnp.maximum(place, 0)), self.valid)


def gather_valid(valid: jax.Array, context: Context) -> Gathered:
    """Return how to have all padding behind the valid tokens of each row; ``valid`` is that of the context."""
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
