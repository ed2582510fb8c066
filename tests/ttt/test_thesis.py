"""Test that recurrences of the field are inner loops, against float64 loops over tokens in NumPy.

All have a linear learner without bias, no output wrap, W0 = 0, and a rate that does not depend on the position. The
state S of the recurrences is the transpose of W.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.ttt import scan
from ttt_jax.ttt.inner_loop import InnerLoop, Parameters, Tokens
from ttt_jax.ttt.learner import Affine, Learner
from ttt_jax.ttt.learners import Linear
from ttt_jax.ttt.objective import dot_product, squared_error
from ttt_jax.ttt.rate import Rate
from ttt_jax.ttt.update import Decay

B, T, H, D_K, D_V = 2, 7, 2, 4, 3


def linear_attention(s, k, v, beta, a):
    return s + beta * np.outer(v, k)


def mamba2(s, k, v, beta, a):
    return a * s + beta * np.outer(v, k)


def delta_net(s, k, v, beta, a):
    return s @ (np.eye(D_K) - beta * np.outer(k, k)) + beta * np.outer(v, k)


def gated_delta_net(s, k, v, beta, a):
    return a * s @ (np.eye(D_K) - beta * np.outer(k, k)) + beta * np.outer(v, k)


@functools.cache
def tokens():
    """Draw q, k of norm 1, v, rates 0.2 to 1 and decays 0.5 to 1, in float64."""
    rng = np.random.default_rng(0)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.standard_normal((2, B, T, H, D_K)))
    return q, k, rng.standard_normal((B, T, H, D_V)), rng.uniform(0.2, 1, (B, T, H)), rng.uniform(0.5, 1, (B, T, H))


def by_recurrence(next_state):
    """Compute z [B, T, H, d_v] and the last S [B, H, d_v, d_k] by a recurrence."""
    q, *inputs = tokens()
    z, s = np.zeros((B, T, H, D_V)), np.zeros((B, H, D_V, D_K))
    for b, h in np.ndindex(B, H):
        for t in range(T):
            s[b, h] = next_state(s[b, h], *(x[b, t, h] for x in inputs))
            z[b, t, h] = s[b, h] @ q[b, t, h]
    return z, s


def by_inner_loop(jit, objective, update, b):
    q, k, v, beta, a = tokens()
    loop = InnerLoop(Learner(Linear(bias=False, features_out=D_V), D_K), objective, Rate(position="1"), update)
    with jax.enable_x64(True):
        w0 = (Affine(jnp.zeros((H, D_K, D_V)), None),)
        gates = {"log_decay": np.log(a)} if update else {}
        parameters = Parameters(w0, {}, loop.rate.position_eta(b))
        z, state, _ = jit(functools.partial(scan.run, loop))(parameters, Tokens(q, k, v, beta, gates))
        # The last mini-batch may have fewer than b tokens, and its step is still pending then.
        factor = np.exp(state.gates["log_decay"])[..., None, None] if update else 1.0
        return np.asarray(z), np.asarray(factor * state.weights[0].weight - state.pending[0].weight)


POINTS = [
    pytest.param(linear_attention, squared_error, (), T, id="linear_attention-squared_error-b_is_T"),
    *(pytest.param(linear_attention, dot_product, (), b, id=f"linear_attention-dot_product-b{b}") for b in (1, 3, T)),
    *(pytest.param(mamba2, dot_product, (Decay(),), b, id=f"mamba2-dot_product-decay-b{b}") for b in (1, 3, T)),
    pytest.param(delta_net, squared_error, (), 1, id="delta_net-squared_error-b1"),
    pytest.param(gated_delta_net, squared_error, (Decay(),), 1, id="gated_delta_net-squared_error-decay-b1"),
]


@pytest.mark.parametrize(("recurrence", "objective", "update", "b"), POINTS)
def test_recurrence_is_an_inner_loop(quick_jit, recurrence, objective, update, b):
    z, weights = by_inner_loop(quick_jit, objective, update, b)
    expected_z, s = by_recurrence(recurrence)
    assert z.dtype == weights.dtype == np.float64
    np.testing.assert_allclose(z, expected_z, rtol=0, atol=1e-12)
    np.testing.assert_allclose(weights.swapaxes(-1, -2), s, rtol=0, atol=1e-12)


def test_recurrences_differ_from_each_other():
    """Check that the test above is not empty because rates and decays are too small."""
    found = [by_recurrence(f)[0] for f in (linear_attention, mamba2, delta_net, gated_delta_net)]
    assert all(np.abs(x - y).max() > 0.1 for i, x in enumerate(found) for y in found[:i])
