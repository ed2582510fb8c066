"""Test that the error of the kernels in bfloat16 does not grow with the position in the sequence.

Most tests use the weights of initialisation, whose outputs are small, so that an instability has room to grow.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.benchmark import inner_loop
from ttt_jax.kernels import ops

pytestmark = pytest.mark.slow


def float64_loop(parameters, tokens):
    """Compute one head of one sequence, with every W_t formed: [T, d]."""
    scale, bias = (np.asarray(parameters.constants[x][0, 0], np.float64) for x in ("norm_scale", "norm_bias"))
    weights = [tuple(np.asarray(x[0], np.float64) for x in layer) for layer in parameters.w0]
    q, k, v, token_eta = (np.asarray(x[0, :, 0], np.float64) for x in tokens[:4])
    position_eta = np.asarray(parameters.position_eta, np.float64)

    def normalise(z):
        centred = z - z.mean(-1, keepdims=True)
        std = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred / std, std

    def gelu(x):
        """Return GELU and its derivative."""
        inner = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
        slope = (1 - inner**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
        return 0.5 * x * (1 + inner), 0.5 * (1 + inner + x * slope)

    def forward(x, weights):
        """Return the inputs of all layers, the slopes between them, and the output."""
        inputs, slopes = [x], []
        for w, c in weights[:-1]:
            x, slope = gelu(inputs[-1] @ w + c)
            inputs, slopes = [*inputs, x], [*slopes, slope]
        w, c = weights[-1]
        return inputs, slopes, inputs[-1] @ w + c

    z, b = np.zeros_like(q), len(position_eta)
    for start in range(0, len(q), b):
        tokens = slice(start, start + b)
        inputs, slopes, out = forward(k[tokens], weights)
        x, std = normalise(out)
        g = scale * (scale * x + bias - (v[tokens] - k[tokens]))
        gradients = [(g - g.mean(-1, keepdims=True) - x * (g * x).mean(-1, keepdims=True)) / std]
        for (w, _), slope in zip(reversed(weights), reversed(slopes), strict=False):
            gradients.insert(0, gradients[0] @ w.T * slope)
        for t in range(b):
            eta = position_eta[t] * token_eta[tokens][: t + 1, None]
            steps = [(x[: t + 1].T, eta * g[: t + 1]) for x, g in zip(inputs, gradients, strict=True)]
            of_token = [(w - x @ g, c - g.sum(0)) for (w, c), (x, g) in zip(weights, steps, strict=True)]
            z[start + t] = q[start + t] + scale * normalise(forward(q[start + t], of_token)[-1])[0] + bias
        weights = of_token
    return z


def official(parameters, tokens):
    """Compute the outputs by the structure of the authors' code."""
    w0, norm, position_eta = parameters
    return inner_loop.official(*tokens[:4], position_eta, w0, norm)


def error_by_part(z, exact, parts):
    split = [np.split(np.asarray(x, np.float64), parts, axis=1) for x in (z, exact)]
    return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(*split, strict=True)]


@pytest.fixture
def errors(by_kernel, by_scan, quick_jit):
    """Return a function for the errors of parts of the sequence, each relative to the size of the outputs there."""

    def compute(problem, exact=None, parts=8, jit=quick_jit):
        loop, *arguments = problem
        z, _ = jit(lambda *x: by_kernel(loop, *x))(*arguments)  # a new function, so that it is traced each time
        if exact is None:
            exact, _ = quick_jit(lambda *x: by_scan(loop, *x))(*problem.in_float32()[1:])
        return error_by_part(z, exact, parts)

    return compute


# For long sequences, running takes longer than compiling.
optimised = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})


def test_error_of_ttt_linear_does_not_grow(make_problem, errors):
    """Check 2k, 8k and 32k tokens: bfloat16 outputs have an error of 2e-3, and bfloat16 products add as much."""
    found = errors(make_problem(tokens=32768, initial=True, dtype=jnp.bfloat16), parts=64, jit=optimised)
    assert max(found) < 6e-3
    for parts in (4, 16, 64):
        assert max(found[parts // 2 : parts]) < 1.3 * max(found[: parts // 2])


def test_error_of_ttt_mlp_does_not_grow_in_the_second_half(make_problem, errors):
    """Check the second half: in the first, small weights grow, and rounding errors with them."""
    found = errors(make_problem(2, tokens=32768, initial=True, dtype=jnp.bfloat16), parts=64, jit=optimised)
    assert max(found) < 6e-3
    assert max(found[32:]) < 1.1 * max(found[:32])


def test_error_at_large_weights_is_near_that_of_the_authors(make_problem, errors, by_scan, quick_jit):
    """Compare at weights as after training, which forget rounding errors slowly."""
    problem = make_problem(tokens=2048, dtype=jnp.bfloat16)
    theirs = quick_jit(official)(*problem[1:])
    exact, _ = quick_jit(partial(by_scan, problem.loop))(*problem.in_float32()[1:])
    for found, allowed in zip(errors(problem, exact), error_by_part(theirs, exact, 8), strict=True):
        assert found < 1.2 * allowed < 5e-3


@pytest.mark.parametrize("depth", [1, 2])
def test_error_against_float64_is_near_that_of_the_authors(make_problem, errors, quick_jit, depth):
    """Compare with the authors' structure in bfloat16, in each part of the sequence."""
    problem = make_problem(depth, tokens=2048, initial=True, dtype=jnp.bfloat16)
    exact = float64_loop(*problem[1:])[None, :, None]
    theirs = quick_jit(official)(*problem[1:])
    for found, allowed in zip(errors(problem, exact), error_by_part(theirs, exact, 8), strict=True):
        assert found < 1.2 * allowed < 6e-3
    assert max(errors(problem.in_float32(), exact)) < 5e-6


def test_error_grows_if_the_mean_of_z_is_not_subtracted(make_problem, errors, monkeypatch):
    """Leave the mean in z, though it is almost zero: rounding errors then grow with the sequence."""

    exact = ops.head_sum

    def head_sum(xs, numerics, by_lanes=False):
        sums = exact(xs, numerics, by_lanes)
        return [0 * sums[0], *sums[1:]] if by_lanes else sums  # by lanes only those of z and z^2 are taken

    monkeypatch.setattr(ops, "head_sum", head_sum)
    found = errors(make_problem(tokens=2048, initial=True, dtype=jnp.bfloat16))
    assert found[-1] > 10 * found[0]
