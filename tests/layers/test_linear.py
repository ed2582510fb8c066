"""Compare projections and the lookup of embeddings, whose gradients are written out, with NumPy and autodiff."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.linear import lookup, project

AXES = ("embed", "mlp")  # play no part without a mesh

RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((7, 4)).astype(np.float32)


def problem(tokens):
    """Return values that bfloat16 holds exactly, so that its gradients differ from float32 ones only by sums."""
    x, kernel, g = (RNG.standard_normal(shape) for shape in ((2, tokens, 5), (5, 4), (2, tokens, 4)))
    return (jnp.asarray(jnp.asarray(a, jnp.bfloat16), jnp.float32) for a in (x, kernel, g))


def gradients(f, x, kernel, g):
    return jax.grad(lambda x, kernel: (f(x, kernel).astype(jnp.float32) * g).sum(), (0, 1))(x, kernel)


def test_projection_gradient_matches_autodiff_in_float32(assert_close):
    x, kernel, g = problem(3)
    assert_close(project(x, kernel, AXES, jnp.float32), np.asarray(x, np.float64) @ np.asarray(kernel), 1e-6)
    actual = gradients(lambda x, kernel: project(x, kernel, AXES, jnp.float32), x, kernel, g)
    assert_close(actual, gradients(jnp.matmul, x, kernel, g), 1e-6)


def test_projection_sums_and_keeps_the_kernel_gradient_in_float32(assert_close):
    """Check a sum over 1024 tokens, of which a sum in bfloat16, or rounded to it, is off by 4e-3."""
    x, kernel, g = problem(512)
    assert project(x, kernel, AXES, jnp.bfloat16).dtype == jnp.bfloat16
    low_x, low_kernel = gradients(lambda x, kernel: project(x, kernel, AXES, jnp.bfloat16), x, kernel, g)
    exact_x, exact_kernel = gradients(jnp.matmul, x, kernel, g)
    assert low_kernel.dtype == jnp.float32
    assert_close(low_kernel, exact_kernel, 1e-5)
    assert_close(low_x, exact_x, 2**-8)


def table_gradient(tokens, g, dtype=jnp.float32):
    """Return the gradient of the table for a gradient ``g`` of the rows."""
    return jax.vjp(lambda table: lookup(table, jnp.asarray(tokens), dtype), TABLE)[1](g.astype(dtype))[0]


def test_lookup_returns_rows():
    tokens = RNG.integers(0, 7, (2, 5))
    np.testing.assert_array_equal(lookup(TABLE, tokens, jnp.float32), TABLE[tokens])
    low = lookup(TABLE, tokens, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, jnp.asarray(TABLE, jnp.bfloat16)[tokens])


def test_lookup_gradient_matches_numpy():
    tokens, g = RNG.integers(0, 7, (3, 50)), RNG.standard_normal((3, 50, 4)).astype(np.float32)
    expected = np.zeros(TABLE.shape)
    np.add.at(expected, tokens, g.astype(np.float64))
    np.testing.assert_allclose(table_gradient(tokens, jnp.asarray(g)), expected, atol=1e-5)


def test_lookup_sums_many_small_gradients_in_float32():
    """Check that 4096 times 2^-6 is 64; a sum in bfloat16 stops growing at 4."""
    tokens = np.zeros((1, 4096), np.int64)
    found = table_gradient(tokens, jnp.full((1, 4096, 4), 2.0**-6), jnp.bfloat16)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0], 64.0)
    np.testing.assert_array_equal(found[1:], 0.0)
