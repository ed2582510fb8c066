"""Test the parts of the fused kernels of TTT-MLP."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import mlp, mlp_layout
from ttt_jax.kernels.layout import Layout
from ttt_jax.kernels.ops import Numerics, stack_heads
from ttt_jax.ttt import learner as learner_lib
from ttt_jax.ttt import learners

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("head_dim", [64, 20, 128])
def test_products_equal_those_of_each_head_alone(head_dim):
    layout = Layout(3, head_dim, 16)
    numerics, s, slot, tokens = Numerics(layout, jnp.dtype(jnp.float32)), layout.pack, layout.slot, 64
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape)

    x, e, w, y, z = draw(s, tokens, slot), draw(s, tokens, tokens), draw(s, slot, 256), *draw(2, s, tokens, 256)
    compact = jnp.asarray(np.concatenate(list(x), 1), jnp.float32)
    pairs = jnp.asarray(np.concatenate(list(e[::-1]), 1), jnp.float32)
    w_, y_, z_ = (jnp.asarray(a.reshape(-1, 256), jnp.float32) for a in (w, y, z))

    found = mlp_layout.product(compact, pairs, w_, y_, numerics)
    np.testing.assert_allclose(found.reshape(s, tokens, 256), x @ w + e @ y, atol=1e-4)
    found_w, found_y = mlp_layout.products(z_, w_, y_, numerics)
    np.testing.assert_allclose(found_w, np.concatenate(list(z @ w.swapaxes(1, 2)), 1), atol=1e-4)
    np.testing.assert_allclose(found_y, np.concatenate(list((z @ y.swapaxes(1, 2))[::-1]), 1), atol=1e-4)
    found = mlp_layout.transposed_product([compact, 2 * compact], [y_, z_], numerics)
    np.testing.assert_allclose(found.reshape(s, slot, 256), x.swapaxes(1, 2) @ (y + 2 * z), atol=2e-4)
    apart = mlp_layout.apart(layout, pairs)
    np.testing.assert_allclose(apart @ mlp_layout.swap(layout, y_), (e @ y).reshape(-1, 256), atol=1e-4)
    if head_dim == slot:
        stacked = mlp_layout.stack_swapped(layout, compact)
        np.testing.assert_array_equal(mlp_layout.swap(layout, stacked), stack_heads(layout, compact))
        np.testing.assert_array_equal(mlp_layout.unstack_swapped(layout, stacked), compact)


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), slow(2, 20), slow(2, 96)])
def test_unpacked_weights_are_the_weights_packed(heads, head_dim):
    learner, layout = learners.mlp(head_dim), Layout(heads, head_dim, 16)
    hidden = mlp.hidden((head_dim, 4 * head_dim, head_dim))
    rng = np.random.default_rng(0)
    like = learner_lib.init(jax.random.key(0), learner, heads)
    weights = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal((2, *x.shape)), jnp.float32), like)
    state = mlp.pack(layout, weights)
    assert state.weight1.shape == (2, layout.packs, 128, hidden)
    np.testing.assert_allclose(state.weight2.reshape(2, -1, layout.slot, hidden).sum(2), 0, atol=1e-4)
    back = mlp.unpack(layout, state, weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, weights)
