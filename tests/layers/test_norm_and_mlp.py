"""Compare RMSNorm and SwiGLU with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.mlp import SwiGLU, gated
from ttt_jax.layers.norm import RMSNorm

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)


def test_rms_norm_matches_numpy(random_params, assert_close):
    module = RMSNorm(jnp.float32)
    params = random_params(module, X)
    x = X.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]
    assert_close(module.apply({"params": params}, X), expected, 1e-6)


def test_rms_norm_epsilon():
    """Check a mean square of 1e-6, where the default epsilon halves the square, and a configured epsilon."""
    params = {"params": {"scale": np.ones(8, np.float32)}}
    small = np.full((1, 1, 8), 1e-3, np.float32)
    np.testing.assert_allclose(RMSNorm(jnp.float32).apply(params, small), 0.5**0.5, rtol=1e-5)
    np.testing.assert_allclose(RMSNorm(jnp.float32, 3e-6).apply(params, small), 0.5, rtol=1e-5)


def test_rms_norm_computes_statistics_of_bfloat16_in_float32():
    """Check that the output is off only by its own rounding."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 64)), jnp.bfloat16)
    y = RMSNorm(jnp.bfloat16).apply({"params": {"scale": np.ones(64, np.float32)}}, x)
    assert y.dtype == jnp.bfloat16
    x = np.asarray(x, np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1.01 * 2**-8)


def test_swiglu_matches_numpy(random_params, assert_close):
    module = SwiGLU(5, jnp.float32, 0.02)
    params = random_params(module, X)
    gate, up, down = (params[name]["kernel"].astype(np.float64) for name in ("gate", "up", "down"))
    assert (gate.shape, up.shape, down.shape) == ((8, 5), (8, 5), (5, 8))
    expected = ((X @ gate) / (1 + np.exp(-(X @ gate))) * (X @ up)) @ down
    assert_close(jax.jit(module.apply)({"params": params}, X), expected)


def test_gradient_of_the_gate_matches_autodiff(assert_close):
    gate, up, g = np.random.default_rng(1).standard_normal((3, 2, 3, 8)).astype(np.float32)
    _, pull = jax.vjp(gated, 3 * gate, up)
    _, plain = jax.vjp(lambda gate, up: gate / (1 + jnp.exp(-gate)) * up, 3 * gate, up)
    assert_close(pull(g), plain(g), 1e-6)


def test_backward_pass_of_swiglu_keeps_only_its_inputs():
    """Count, in bfloat16, gate, up, their product, and x for each of gate and up (compiled, these are one)."""
    module, x = SwiGLU(64, jnp.bfloat16, 0.02), jnp.ones((1, 1024, 8))
    params = module.init(jax.random.key(0), x)
    _, pull = jax.vjp(module.apply, params, x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull) if leaf.shape[:2] == (1, 1024))
    assert kept == 1024 * 2 * (3 * 64 + 2 * 8)
