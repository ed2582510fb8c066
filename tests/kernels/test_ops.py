"""Test derivatives that are written out in kernels against autodiff of the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import linear, ops
from ttt_jax.kernels.layout import Layout
from ttt_jax.kernels.ops import Numerics, head_mean
from ttt_jax.ttt import learners

LAYOUTS = [Layout(2, 64, 16), Layout(1, 96, 16), Layout(1, 128, 16)]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def numerics(layout):
    return Numerics(layout, jnp.dtype(jnp.float32))


def drawn(layout, *rows, seed=0):
    """Draw arrays [rows, 128], with zeros in lanes without a feature."""
    rng = np.random.default_rng(seed)
    used = np.arange(128) % layout.slot < layout.head_dim
    return [jnp.asarray(rng.standard_normal((n, 128)) * used, jnp.float32) for n in rows]


def plain(layout, function, *xs):
    """Apply a function of [rows, d] to each head."""
    s, d = layout.pack, layout.head_dim

    def heads(x):
        return x.reshape(len(x), s, layout.slot)[:, :, :d].transpose(1, 0, 2)

    z = jax.vmap(function)(*map(heads, xs))
    return jnp.pad(z.transpose(1, 0, 2), ((0, 0), (0, 0), (0, layout.slot - d))).reshape(len(xs[0]), 128)


def normalise(z):
    """Return ``(z - mean) / std`` over the last axis, and ``1 / std``."""
    centred = z - z.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred * inverse_std, inverse_std


def plain_loss_gradient(layout, z, scale, bias, target):
    def of_head(z, scale, bias, target):
        x_hat, inverse_std = normalise(z)
        g = (x_hat * scale + bias - target) * scale
        return inverse_std * (g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True))

    return plain(layout, of_head, z, scale, bias, target)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradient_and_its_derivative_equal_autodiff(layout, quick_jit, assert_close):
    how = numerics(layout)
    z, target, u, scale, bias = drawn(layout, 5, 5, 5, 1, 1)
    z = z - head_mean([z], how)[0]  # as for centred weights
    s2, h = scale * scale, scale * (bias - target)

    @quick_jit
    def expected():
        rows = [jnp.broadcast_to(x, z.shape) for x in (scale, bias)]
        value, vjp = jax.vjp(lambda *x: plain_loss_gradient(layout, *x), z, *rows, target)
        return value, *vjp(u)

    @quick_jit
    def actual():
        at = ops.loss_gradient(z, s2, h, how)
        in_chain = ops.loss_gradient_in_chain(z, s2, h, *ops.means_for_chain(s2, h, how), how)
        dz, dh = ops.loss_gradient_backward(u, at, ops.means_for_backward(at, s2, how), s2, how)
        d_scale = 2 * scale * (dh * at.x) + dh * (bias - target)
        return in_chain, (at.value, dz, d_scale, dh * scale, -dh * scale)

    in_chain, found = actual()
    assert_close(found, expected())
    assert_close(in_chain, found[0])


@pytest.mark.parametrize("layout", [LAYOUTS[0], *map(slow, LAYOUTS[1:])])
def test_normalise_and_its_derivative_equal_autodiff(layout, assert_close):
    x, dx = drawn(layout, 6, 6)
    expected, vjp = jax.vjp(lambda x: plain(layout, lambda z: normalise(z)[0], x), x)
    actual, actual_vjp = jax.vjp(lambda x: ops.normalise(x, numerics(layout)), x)
    assert_close((actual, actual_vjp(dx)), (expected, vjp(dx)))


@pytest.mark.parametrize("layout", [LAYOUTS[0], slow(LAYOUTS[1])])
def test_known_chain_and_its_derivative_equal_those_of_the_solved_chain(layout, quick_jit, assert_close):
    s, length = layout.pack, layout.group_tokens
    z0, h, s2, d_steps = drawn(layout, length, length, 1, s * length)
    z0 = z0 - head_mean([z0], numerics(layout))[0]
    rng = np.random.default_rng(3)
    before = np.arange(s * length)[None] // (s * layout.mini_batch) < np.arange(length)[:, None] // layout.mini_batch
    e = jnp.asarray(0.1 * rng.standard_normal((length, s * length)) * before, jnp.float32)
    eta = jnp.asarray(rng.random((length, s)), jnp.float32)

    def solve(way):
        def steps(z0, e, s2, h, eta):
            found, z = linear.solve_chain(z0, e, s2, h, eta, numerics(layout))
            known = jax.lax.stop_gradient(z)
            return found if way == "chain" else linear.known_chain(z0, e, s2, h, eta, known, numerics(layout))

        found, vjp = jax.vjp(steps, z0, e, s2, h, eta)
        d_z0, d_e, *rest = vjp(d_steps)
        return found, (d_z0, d_e * before, *rest)  # e is zero elsewhere, whatever the steps

    expected, actual = (quick_jit(solve, static_argnums=0)(way) for way in ("chain", "known"))
    assert_close(actual, expected)


def test_gelu_and_its_derivatives_equal_the_plain_form():
    z = jnp.linspace(-6, 6, 64).reshape(8, 8)
    value, first, _ = ops.gelu_and_derivatives(z)
    exact = learners.gelu_and_derivative
    np.testing.assert_allclose(value, exact(z)[0], atol=1e-6)
    np.testing.assert_allclose(first, exact(z)[1], atol=3e-6)
    np.testing.assert_allclose(ops.gelu(z), value, atol=1e-6)
    np.testing.assert_allclose(ops.gelu_and_derivative(z)[1], first, atol=1e-6)
    with jax.enable_x64(True):  # in float32, the second derivative far from 0 is only the rounding of tanh
        z = jnp.asarray(np.asarray(z), jnp.float64)
        expected = *exact(z), jax.vmap(jax.grad(lambda x: exact(x)[1]))(z.ravel()).reshape(8, 8)
        for actual, desired in zip(ops.gelu_and_derivatives(z), expected, strict=True):
            np.testing.assert_allclose(actual, desired, atol=1e-12)
