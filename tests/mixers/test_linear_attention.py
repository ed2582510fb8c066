"""Compare linear attention with sums written out in NumPy, and with the TTT layer that equals it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.mixers.linear_attention import linear_attention
from ttt_jax.models.language_model import build_model

BATCH, HEADS, D = 2, 3, 4
RNG = np.random.default_rng(0)


def numpy_linear_attention(q, k, v, sums, begins=()):
    z = np.zeros(q.shape)
    for t in range(q.shape[1]):
        if t in begins:
            sums = np.zeros(sums.shape)
        sums = sums + np.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
        z[:, t] = np.einsum("bhi,bhij->bhj", q[:, t], sums)
    return z, sums


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (4, 4), (9, 4), (7, 16)])
def test_linear_attention_matches_sums_of_outer_products(quick_jit, assert_close, tokens, chunk):
    rng = np.random.default_rng(tokens)
    q, k, v = rng.standard_normal((3, BATCH, tokens, HEADS, D)).astype(np.float32)
    sums = rng.standard_normal((BATCH, HEADS, D, D)).astype(np.float32)
    found = quick_jit(linear_attention, static_argnames="chunk")(q, k, v, sums, chunk=chunk)
    assert_close(found, numpy_linear_attention(*(x.astype(np.float64) for x in (q, k, v, sums))), 1e-6)
    assert found[0].dtype == found[1].dtype == jnp.float32


@pytest.mark.parametrize("begins", [(0,), (4,), (5, 6), (3, 8), (2, 10)])
def test_each_document_has_its_own_sums(quick_jit, assert_close, begins):
    """Check documents that begin at a chunk, within one, twice in one, and at the last token."""
    q, k, v = RNG.standard_normal((3, BATCH, 11, HEADS, D)).astype(np.float32)
    sums = RNG.standard_normal((BATCH, HEADS, D, D)).astype(np.float32)
    document = np.tile(np.isin(np.arange(11), begins).cumsum(), (BATCH, 1))
    found = quick_jit(linear_attention, static_argnames="chunk")(q, k, v, sums, document, chunk=4)
    assert_close(found, numpy_linear_attention(*(x.astype(np.float64) for x in (q, k, v, sums)), begins), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_theorem_1_in_a_whole_model(random_params, quick_jit, assert_close, dtype):
    """Compare with TTT-Linear in the Transformer backbone: the same parameters, outputs and gradients.

    It has b = T, W0 = 0, no output wrap or biases, and a rate that is not learned.
    """
    tokens = np.random.default_rng(0).integers(0, 11, (BATCH, 10))

    def model(mixer):
        c = config_lib.default().model
        c.update(mixer=mixer, vocab_size=11, width=8, num_layers=2, num_heads=2, mlp_width=12, dtype=dtype)
        c.ttt.update(
            backbone="transformer", mini_batch=10, output="none", bias=False, learned_w0=False, learned_eta=False
        )
        return build_model(c)

    def read(mixer):
        loss = lambda params: (model(mixer).apply({"params": params}, tokens)[0] ** 2).mean()  # noqa: E731
        return quick_jit(jax.value_and_grad(loss))

    params = random_params(model("linear_attention"), tokens, stddev=0.3)
    found = read("ttt_linear")(params)
    assert_close(found, read("linear_attention")(params), 1e-5 if dtype == "float32" else 2e-2)
    assert min(np.abs(g).max() for g in jax.tree.leaves(found[1])) > 1e-4  # of every parameter
