"""Compare the causal convolution with explicit loops, and its gradient with autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers import conv
from ttt_jax.layers.context import Context

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
def test_convolution_matches_the_explicit_loop(assert_close, width):
    params, x = random_conv(width, 3, 6)
    y, state = conv.CausalConv(width, jnp.float32).apply(params, x)
    assert state is None
    assert_close(y, numpy_conv(params, x), 1e-6)


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 2), (2, 4), (5, 1)])
def test_pieces_match_the_whole_sequence(assert_close, lengths):
    params, x = random_conv(4, 3, 6)
    module = conv.CausalConv(4, jnp.float32)
    state, outputs = conv.initial_state(2, 4, 3, jnp.float32), []
    for start, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        y, state = module.apply(params, x[:, start : start + length], state)
        outputs.append(y)
    assert_close(np.concatenate(outputs, axis=1), numpy_conv(params, x), 1e-6)
    np.testing.assert_array_equal(state, x[:, -3:])


@pytest.mark.parametrize("since", [None, np.array([[4, 5, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]])])
def test_gradient_matches_autodiff(quick_jit, assert_close, since):
    """Compare gradients with and without ``since``, which restricts the sum to the same document."""
    params, x = random_conv(4, 3, 9)
    cotangent = RNG.standard_normal((2, 6, 3)).astype(np.float32)

    def plain(x, kernel, since):
        windows = jnp.stack([x[:, j : j + 6] for j in range(4)])
        if since is not None:
            windows *= (since >= np.arange(3, -1, -1)[:, None, None])[..., None]
        return jnp.einsum("jbtc,jc->btc", windows, kernel)

    def gradient(f):
        gradients = quick_jit(jax.value_and_grad(lambda x, kernel: (f(x, kernel, since) * cotangent).sum(), (0, 1)))
        return gradients(x, params["params"]["kernel"])

    assert_close(gradient(conv.convolve), gradient(plain), 1e-6)


@pytest.mark.parametrize(("width", "tokens"), [(4, 6), (4, 2), (1, 3)])
@pytest.mark.parametrize("given", ["valid", "reset", "both"])
def test_convolution_reads_the_last_valid_tokens_of_the_document(quick_jit, assert_close, width, tokens, given):
    """Check pieces, also of fewer tokens than the convolution reads, with padding anywhere.

    The state holds the inputs of the document, and zeros where it has fewer.
    """
    params, x = random_conv(width, 3, 3 * tokens)
    module = conv.CausalConv(width, jnp.float32)
    read = quick_jit(lambda x, state, context: module.apply(params, x, state, context))
    for seed in range(6):
        valid, reset = (lambda r: r.random((2, *x.shape[:2])) < r.random((2, 2, 1)))(np.random.default_rng(seed))
        context = Context(None if given == "reset" else valid, None if given == "valid" else reset)
        state, outputs = conv.initial_state(2, width, 3, jnp.float32), []
        for start in range(0, 3 * tokens, tokens):
            piece = np.s_[:, start : start + tokens]
            y, state = read(
                x[piece], state, jax.tree.map(lambda m, piece=piece: m[piece] if np.ndim(m) else m, context)
            )
            outputs.append(y)
        found = np.concatenate(outputs, axis=1)
        for row in range(2):
            document, expected = [], np.zeros(x.shape[1:])
            for t in range(x.shape[1]):
                if given == "reset" or valid[row, t]:
                    document = [] if given != "valid" and reset[row, t] else document
                    document.append(t)
                    expected[t] = numpy_conv(params, x[row : row + 1, document])[0, -1]
            assert_close(found[row], expected, 1e-6)
            last = np.concatenate([np.zeros((width, 3)), x[row, document]])
            np.testing.assert_array_equal(state[row], last[len(last) - width + 1 :])


def test_kernels_start_with_variance_one_over_their_width():
    params = conv.CausalConv(4, jnp.float32).init(jax.random.key(0, impl="rbg"), np.zeros((1, 1, 4096), np.float32))[
        "params"
    ]
    kernel = params["kernel"]
    np.testing.assert_allclose([kernel.mean(), kernel.std()], [0, 0.5], atol=0.02)
    assert not params["bias"].any()
