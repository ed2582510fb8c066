"""Test the Nadaraya-Watson estimator against softmax attention in NumPy (Theorem 2 of the paper)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.ttt import nadaraya_watson


def draw(tokens, scale=1.0):
    """Draw q, k [2, T, 3, 4] and v [2, T, 3, 5]."""
    rng = np.random.default_rng(0)
    return tuple(
        (s * rng.standard_normal((2, tokens, 3, d))).astype(np.float32) for s, d in ((scale, 4), (1, 4), (1, 5))
    )


def causal_softmax_attention(q, k, v):
    """Compute attention in float64, one query at a time."""
    z = np.zeros(v.shape)
    for b, t, h in np.ndindex(v.shape[:3]):
        logits = k[b, : t + 1, h].astype(float) @ q[b, t, h] / np.sqrt(k.shape[-1])
        kernel = np.exp(logits - logits.max())
        z[b, t, h] = kernel @ v[b, : t + 1, h] / kernel.sum()
    return z


def token_by_token(q, k, v, capacity):
    def step(state, token):
        q, k, v = (x[:, None] for x in token)
        state = nadaraya_watson.write(state, k, v)
        return state, nadaraya_watson.read(state, q)[:, 0]

    start = nadaraya_watson.empty(len(q), capacity, q.shape[2], q.shape[-1], v.shape[-1])
    state, z = jax.lax.scan(step, start, tuple(jnp.asarray(x).swapaxes(0, 1) for x in (q, k, v)))
    return z.swapaxes(0, 1), state


@pytest.mark.parametrize("scale", [1.0, 1e4])  # kernels up to exp(1e4), beyond float32
def test_theorem_2_write_and_read_are_causal_softmax_attention(quick_jit, assert_close, scale):
    q, k, v = draw(7, scale)
    z, state = quick_jit(token_by_token, static_argnums=3)(q, k, v, 9)
    assert_close(z, causal_softmax_attention(q, k, v), 1e-5)
    assert int(state.written) == 7


def test_empty_places_change_nothing(quick_jit, assert_close):
    q, k, v = draw(6)

    @quick_jit
    def full_and_loose():
        state = nadaraya_watson.write(nadaraya_watson.empty(2, 6, 3, 4, 5), k, v)
        loose = nadaraya_watson.write(nadaraya_watson.empty(2, 11, 3, 4, 5), k[:, :2], v[:, :2])
        loose = nadaraya_watson.write(loose, k[:, 2:], v[:, 2:])
        return nadaraya_watson.read(state, q), nadaraya_watson.read(loose, q)

    full, loose = full_and_loose()
    assert_close(loose, full, 1e-6)
    assert_close(full[:, -1], causal_softmax_attention(q, k, v)[:, -1], 1e-5)


def test_too_many_tokens_are_an_error_and_nan_in_a_traced_program(quick_jit):
    q, k, v = draw(5)
    state = nadaraya_watson.empty(2, 7, 3, 4, 5)._replace(written=np.int32(5))
    with pytest.raises(ValueError, match="5 more tokens after 5 do not fit; expected at most 7 in all"):
        nadaraya_watson.write(state, k, v)
    z, _ = quick_jit(token_by_token, static_argnums=3)(q, k, v, 4)
    assert np.isfinite(z[:, :4]).all()
    assert np.isnan(z[:, 4:]).all()
    assert np.isnan(quick_jit(lambda: nadaraya_watson.read(nadaraya_watson.empty(2, 7, 3, 4, 5), q))()).all()


def test_write_refuses_tokens_of_another_shape():
    _, k, v = draw(5)
    with pytest.raises(ValueError, match=r"k \(2, 5, 3, 4\) and v \(2, 5, 3, 5\): expected \(2, n, 2, 4\) and"):
        nadaraya_watson.write(nadaraya_watson.empty(2, 7, 2, 4, 5), k, v)
