"""Test packing of heads and tokens into lanes and rows, and unpacking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_jax.kernels import layout as layout_lib
from ttt_jax.kernels import linear
from ttt_jax.kernels.layout import Layout
from ttt_jax.ttt.learner import Affine


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 40), st.sampled_from([8, 48, 64, 96, 128]), st.integers(1, 300))
def test_unpacked_tokens_are_the_tokens_packed(heads, head_dim, tokens):
    layout = Layout(heads, head_dim, 16)
    x = np.arange(2 * tokens * heads * head_dim, dtype=np.float32).reshape(2, tokens, heads, head_dim)
    packed = layout_lib.pack_tokens(layout, jnp.asarray(x))
    assert packed.shape[1] % layout.block_tokens == 0
    assert packed.shape[1] < tokens + layout.block_tokens
    assert packed.shape[2] == layout.packs * 128
    assert layout.packs % layout.block_packs == 0
    assert layout.packs - layout.block_packs * (heads // (layout.pack * layout.block_packs)) <= layout.block_packs
    np.testing.assert_array_equal(layout_lib.unpack_tokens(layout, packed, tokens), x)
    assert float(jnp.abs(packed).sum()) == pytest.approx(x.sum(), rel=1e-4)  # all else is zero


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (4, 64), (2, 96), (1, 128), (5, 20)])
def test_unpacked_weights_are_the_weights_packed_with_their_mean(quick_jit, heads, head_dim):
    layout = Layout(heads, head_dim, 16)
    rng = np.random.default_rng(0)
    start = (Affine(*(rng.standard_normal((2, heads, n, head_dim)).astype(np.float32) for n in (head_dim, 1))),)
    packed = quick_jit(lambda start: linear.pack(layout, start))(start)
    packed = jax.tree.map(np.asarray, packed)
    assert packed.weight.shape == (2, layout.packs, 128, 128)
    of_head = packed.weight.reshape(2, layout.packs, 128, layout.pack, layout.slot)
    np.testing.assert_allclose(of_head.sum(-1), 0, atol=1e-4)
    back = quick_jit(lambda packed, start: linear.unpack(layout, packed, start))(packed, start)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, start)
    assert float((packed.weight**2).sum()) < float((start[0].weight ** 2).sum())  # no block is repeated


@pytest.mark.parametrize(("heads", "b"), [(2, 16), (1, 8), (2, 64)])
def test_coefficients_equal_their_definition(heads, b):
    """Compare token by token."""
    layout = Layout(heads, 64, b)
    eta = np.linspace(1, 2, b)
    keys, queries, end = layout_lib.coefficients(layout, jnp.asarray(eta))
    length, s = layout.group_tokens, layout.pack
    expected = np.zeros((2, length, layout.group, s, b))
    for t in range(length):
        for m in range(layout.group):
            for i in range(b):
                if m < t // b:
                    expected[:, t, m, :, i] = eta[-1]
                elif m == t // b and i <= t % b:
                    expected[1, t, m, :, i] = eta[t % b]
    np.testing.assert_allclose([keys, queries], expected.reshape(2, length, -1), rtol=1e-6)
    np.testing.assert_allclose(end, eta[-1])


def test_packed_rates_follow_their_heads():
    layout = Layout(18, 64, 16)  # 9 packs, in two blocks of 5
    rates = jnp.asarray(np.random.default_rng(0).random((2, 100, 18)))
    packed = np.asarray(layout_lib.pack_rates(layout, rates))
    assert packed.shape == (2, 2, 256, 10)
    for head in range(18):
        np.testing.assert_array_equal(packed[:, head // 10, :100, head % 10], rates[:, :, head])
    assert packed.sum() == pytest.approx(float(rates.sum()))
