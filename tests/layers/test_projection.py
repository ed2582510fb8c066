"""The projection's written-out gradient against autodiff of ``x @ kernel``."""

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.layers.projection import project

AXES = ("embed", "mlp")  # play no part without a mesh

RNG = np.random.default_rng(0)


def problem(tokens):
    """Values that bfloat16 holds exactly, so that its gradients differ from float32 ones by sums alone."""
    x, kernel, g = (RNG.standard_normal(shape) for shape in ((2, tokens, 5), (5, 4), (2, tokens, 4)))
    return (jnp.asarray(jnp.asarray(a, jnp.bfloat16), jnp.float32) for a in (x, kernel, g))


def gradients(f, x, kernel, g):
    return jax.grad(lambda x, kernel: (f(x, kernel).astype(jnp.float32) * g).sum(), (0, 1))(x, kernel)


def test_float32_gradient_is_that_of_autodiff(assert_close):
    x, kernel, g = problem(3)
    assert_close(project(x, kernel, AXES, jnp.float32), np.asarray(x, np.float64) @ np.asarray(kernel), 1e-6)
    actual = gradients(lambda x, kernel: project(x, kernel, AXES, jnp.float32), x, kernel, g)
    assert_close(actual, gradients(jnp.matmul, x, kernel, g), 1e-6)


def test_bfloat16_kernel_gradient_is_summed_and_kept_in_float32(assert_close):
    """Of 1024 tokens; a sum in bfloat16, or rounded to it, is off by 4e-3."""
    x, kernel, g = problem(512)
    assert project(x, kernel, AXES, jnp.bfloat16).dtype == jnp.bfloat16
    low_x, low_kernel = gradients(lambda x, kernel: project(x, kernel, AXES, jnp.bfloat16), x, kernel, g)
    exact_x, exact_kernel = gradients(jnp.matmul, x, kernel, g)
    assert low_kernel.dtype == jnp.float32
    assert_close(low_kernel, exact_kernel, 1e-5)
    assert_close(low_x, exact_x, 2**-8)
