"""The causal convolution against an explicit loop, its written-out gradient against autodiff, and streaming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers import conv

RNG = np.random.default_rng(0)


def random_conv(width, channels, tokens):
    kernel, bias, x = (RNG.standard_normal(s).astype(np.float32) for s in ((width, channels), channels, (2, tokens, 3)))
    return {"params": {"kernel": kernel, "bias": bias}}, x


def numpy_conv(params, x):
    kernel, bias = (params["params"][name].astype(np.float64) for name in ("kernel", "bias"))
    width, y = len(kernel), np.zeros(x.shape)
    for t in range(x.shape[1]):
        for j in range(width):
            if t - width + 1 + j >= 0:
                y[:, t] += kernel[j] * x[:, t - width + 1 + j]
    return y + bias


@pytest.mark.parametrize("width", [1, 4])
def test_is_the_explicit_loop(assert_close, width):
    params, x = random_conv(width, 3, 6)
    y, state = conv.CausalConv(width, jnp.float32).apply(params, x)
    assert state is None
    assert_close(y, numpy_conv(params, x), 1e-6)


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 2), (2, 4), (5, 1)])
def test_pieces_are_one_go(assert_close, lengths):
    params, x = random_conv(4, 3, 6)
    module = conv.CausalConv(4, jnp.float32)
    state, outputs = conv.initial_state(2, 4, 3, jnp.float32), []
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        y, state = module.apply(params, x[:, start : start + length], state)
        outputs.append(y)
    assert_close(np.concatenate(outputs, axis=1), numpy_conv(params, x), 1e-6)
    np.testing.assert_array_equal(state, x[:, -3:])


def test_gradient_is_that_of_autodiff(quick_jit, assert_close):
    params, x = random_conv(4, 3, 9)
    cotangent = RNG.standard_normal((2, 6, 3)).astype(np.float32)

    def plain(x, kernel):
        windows = jnp.stack([x[:, j : j + 6] for j in range(4)])
        return jnp.einsum("jbtc,jc->btc", windows, kernel)

    def gradient(f):
        gradients = quick_jit(jax.grad(lambda x, kernel: (f(x, kernel) * cotangent).sum(), (0, 1)))
        return gradients(x, params["params"]["kernel"])

    assert_close(gradient(conv.convolve), gradient(plain), 1e-6)


def test_kernels_start_with_variance_one_over_their_width():
    params = conv.CausalConv(4, jnp.float32).init(jax.random.key(0, impl="rbg"), np.zeros((1, 1, 4096), np.float32))[
        "params"
    ]
    kernel = params["kernel"]
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.5], atol=0.02)
    assert not params["bias"].any()
