"""Compare rotary positions with complex numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers import rope

POSITIONS = np.array([0, 1, 31, 255, 2048, 32767, 32768])
X = np.random.default_rng(0).standard_normal((2, len(POSITIONS), 3, 8))


def complex_rotation(x, positions, theta, xp=np):
    d = x.shape[-1]
    turns = np.exp(1j * positions[:, None, None] * theta ** (-np.arange(0, d, 2) / d))
    z = (x[..., ::2] + 1j * x[..., 1::2]) * turns
    return xp.stack([z.real, z.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_pairs_rotate_like_complex_numbers(theta):
    """Compare angles that are 2e-3 off in float32 at position 32768, and exact to rounding at small positions."""
    actual = np.asarray(rope.rotate(jnp.asarray(X, jnp.float32), POSITIONS, theta))
    expected = complex_rotation(X, POSITIONS, theta)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-2)
    np.testing.assert_allclose(actual[:, :3], expected[:, :3], rtol=0, atol=1e-5)


def test_half_split_pairs_are_interleaved_ones_in_another_order(assert_close):
    x, g = (jnp.asarray(np.random.default_rng(i).standard_normal(X.shape), jnp.float32) for i in range(2))
    halves = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])  # of interleaved features
    actual, pull = jax.vjp(lambda x: rope.rotate(x, POSITIONS, 500.0, "half_split"), x[..., halves])
    expected, expected_pull = jax.vjp(lambda x: rope.rotate(x, POSITIONS, 500.0), x)
    assert_close(actual, expected[..., halves], 1e-6)
    assert_close(pull(g[..., halves])[0], expected_pull(g)[0][..., halves], 1e-6)


def test_rows_may_have_different_positions(assert_close):
    positions = np.stack([POSITIONS, POSITIONS[::-1]])
    x = jnp.asarray(X, jnp.float32)
    rows = [rope.rotate(x[i : i + 1], positions[i]) for i in range(2)]
    assert_close(rope.rotate(x, positions), np.concatenate(rows), 1e-6)
    _, pull = jax.vjp(lambda x: rope.rotate(x, positions), x)
    _, pulls = jax.vjp(lambda x: jnp.concatenate([rope.rotate(x[i : i + 1], positions[i]) for i in range(2)]), x)
    assert_close(pull(x), pulls(x), 1e-6)


def test_angles_of_bfloat16_inputs_are_float32():
    """Compare within the rounding of the output; bfloat16 angles are 0.06 off at position 32 and 2 off at 2048."""
    low = jnp.asarray(X, jnp.bfloat16)
    actual = rope.rotate(low, POSITIONS)
    assert actual.dtype == jnp.bfloat16
    expected = complex_rotation(np.asarray(low, np.float64), POSITIONS, 10000.0)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2**-8, atol=1e-2)


def test_gradient_matches_autodiff_of_complex_rotation():
    x, g = (jnp.asarray(np.random.default_rng(i).standard_normal(X.shape), jnp.float32) for i in range(2))
    _, pull = jax.vjp(lambda x: rope.rotate(x, POSITIONS[:4], 500.0), x[:, :4])
    _, expected = jax.vjp(lambda x: complex_rotation(x, POSITIONS[:4], 500.0, jnp), x[:, :4])
    np.testing.assert_allclose(pull(g[:, :4])[0], expected(g[:, :4])[0], rtol=0, atol=1e-5)
