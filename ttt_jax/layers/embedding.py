"""Tokens to vectors. [B, T] to [B, T, D]; V vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.distributed.activations import constrain, locally, sum_over_rows

AXES = ("vocab", "embed")


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table [V, D] of axes :data:`AXES`, in ``dtype``; the gradient of the table is summed in float32.

    Every device reads the rows of its own sequences from the whole table, and adds their gradients up alone. Left to
    the compiler, each device adds up a few columns for the tokens of all devices, which it first has to be sent.
    """
    whole = constrain(table.astype(dtype), None, None)
    return locally(lambda table, tokens: table[tokens], (P(), P("batch")), P("batch"))(whole, tokens)


def _forward(table, tokens, dtype):
    return lookup(table, tokens, dtype), (table, tokens)


def _backward(dtype, saved, g):
    table, tokens = saved

    def add_up(tokens, g):
        return sum_over_rows(jnp.zeros(table.shape, jnp.float32).at[tokens].add(g.astype(jnp.float32)), None, AXES[1])

    gradient = locally(add_up, (P("batch"), P("batch")), P(None, AXES[1]))(tokens, g)
    return constrain(gradient, *AXES).astype(table.dtype), None


lookup.defvjp(_forward, _backward)
