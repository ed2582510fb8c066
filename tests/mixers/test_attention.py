"""Blocked causal attention against a softmax in float64, and the layer's positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.layers import rope
from ttt_jax.mixers.attention import Attention, cached_attention, causal_attention


def numpy_attention(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    tokens = q.shape[1]
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(np.tri(tokens, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("tokens", "block"), [(11, 4), (8, 4), (3, 4), (17, 1)])
def test_blocks_are_the_softmax(quick_jit, assert_close, tokens, block):
    """Tokens that are no multiple of the block, that are, that are fewer; and a block too small for 16 of them."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, tokens, 3, 6)).astype(np.float32)
    actual = quick_jit(causal_attention, static_argnames="block")(q, k, v, block=block)
    assert_close(actual, numpy_attention(q, k, v), 1e-6)


@pytest.mark.parametrize(("start", "tokens", "block"), [(5, 7, 3), (0, 6, 3), (9, 1, 4)])
def test_queries_attend_to_a_cache_up_to_themselves(quick_jit, assert_close, start, tokens, block):
    """Blocks that are not full, that are, and a single query; behind the last position the cache holds rubbish."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, start + tokens, 3, 6)).astype(np.float32)
    keys, values = (np.pad(x, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=1e3) for x in (k, v))
    attend = quick_jit(cached_attention, static_argnames="block")
    actual = attend(q[:, start:], keys, values, np.int32(start), block=block)
    assert_close(actual, numpy_attention(q, k, v)[:, start:], 1e-6)


def test_layer_attends_with_absolute_positions(random_params, assert_close):
    module = Attention(num_heads=2, dtype=jnp.float32, rope_theta=100.0)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    params = random_params(module, x)
    q, k, v = ((x @ params[name]["kernel"]).reshape(2, 5, 2, 4) for name in ("wq", "wk", "wv"))
    y = numpy_attention(*(rope.rotate(a, jnp.arange(5), 100.0) for a in (q, k)), v).reshape(2, 5, 8)
    assert_close(module.apply({"params": params}, x)[0], y @ params["wo"]["kernel"])
