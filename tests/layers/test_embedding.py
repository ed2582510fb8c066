"""The lookup of embeddings: rows, and a gradient that is summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.embedding import lookup

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((7, 4)).astype(np.float32)


def gradient(tokens, g, dtype=jnp.float32):
    """Of the table, for a gradient ``g`` of the rows that were looked up."""
    return jax.vjp(lambda table: lookup(table, jnp.asarray(tokens), dtype), TABLE)[1](g.astype(dtype))[0]


def test_rows():
    tokens = RNG.integers(0, 7, (2, 5))
    np.testing.assert_array_equal(lookup(TABLE, tokens, jnp.float32), TABLE[tokens])
    low = lookup(TABLE, tokens, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, jnp.asarray(TABLE, jnp.bfloat16)[tokens])


def test_gradient_is_that_of_numpy():
    tokens, g = RNG.integers(0, 7, (3, 50)), RNG.standard_normal((3, 50, 4)).astype(np.float32)
    expected = np.zeros(TABLE.shape)
    np.add.at(expected, tokens, g.astype(np.float64))
    np.testing.assert_allclose(gradient(tokens, jnp.asarray(g)), expected, atol=1e-5)


def test_many_small_gradients_are_not_lost_in_bfloat16():
    """4096 times 2^-6 is 64; a sum in bfloat16 stops growing at 4."""
    tokens = np.zeros((1, 4096), np.int64)
    found = gradient(tokens, jnp.full((1, 4096, 4), 2.0**-6), jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0], 64.0)
    np.testing.assert_array_equal(found[1:], 0.0)
