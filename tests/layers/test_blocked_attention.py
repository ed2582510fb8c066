"""Compare attention in blocks, in documents and beside kept keys with a softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import numpy_attention, seen

from ttt_jax.layers.blocked_attention import Keys, causal_attention, document_attention
from ttt_jax.ttt import operations


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize(
    ("tokens", "block", "groups"), [(11, 4, 4), (8, 4, 4), (3, 4, 4), (17, 1, 4), (11, 4, 2), (8, 4, 1)]
)
def test_attention_in_blocks_matches_the_softmax(quick_jit, assert_close, tokens, block, groups, window):
    """Check numbers of tokens that are no multiple of the block, a multiple, and fewer; and more than 16 blocks."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, tokens, 4, 6)).astype(np.float32)
    k, v = k[:, :, :groups], v[:, :, :groups]
    actual = quick_jit(causal_attention, static_argnames=("window", "block"))(q, k, v, window=window, block=block)
    assert_close(actual, numpy_attention(q, k, v, seen(tokens, window)), 1e-6)


def test_a_window_includes_the_token_itself():
    v = np.eye(5, dtype=np.float32)[None, :, None]
    weights = np.asarray(causal_attention(np.zeros_like(v), np.zeros_like(v), v, window=2))[0, :, 0]
    np.testing.assert_allclose(weights[[0, 1, 4]], [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 0.5]])


def test_only_keys_within_the_window_are_computed():
    """Count 32 tokens in 16 blocks of 2 queries: each against the 3 + 2 - 1 keys that one of them sees."""
    x = jax.ShapeDtypeStruct((1, 32, 1, 8), jnp.float32)
    program = jax.make_jaxpr(functools.partial(causal_attention, window=3, block=2))(x, x, x)
    assert operations.products(program.jaxpr) == 2 * (2 * 8) * (2 * 2 + 15 * 2 * 4)


@pytest.mark.parametrize(("window", "block", "groups"), [(None, 256, 4), (None, 3, 2), (2, 256, 1), (2, 3, 4)])
def test_kept_and_new_keys_share_one_softmax(quick_jit, assert_close, window, block, groups):
    """Check that queries see the keys of their document up to their own position; padding sees nothing and gives 0."""
    rng = np.random.default_rng(0)
    tokens, slots = 7, 5
    q = rng.standard_normal((2, tokens, 4, 6)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, tokens, groups, 6)).astype(np.float32)
    kept_k, kept_v = 10 * rng.standard_normal((2, 2, slots, groups, 6)).astype(np.float32)
    # The ring holds positions 3 to 7 of document 0, and in the second row those up to 1.
    kept = Keys(
        kept_k, kept_v, np.array([[5, 6, 7, 3, 4], [0, 1, -3, -2, -1]]), np.array([[0] * 5, [0, 0, -1, -1, -1]])
    )
    document = np.array([[0, 0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, -1, -1]])
    position = np.array([[8, 9, 10, 0, 1, 2, 0], [2, 3, 0, 1, 2, 3, 3]])
    piece = Keys(k, v, position, document)
    attend = quick_jit(document_attention, static_argnames=("window", "block"))
    joined = jax.tree.map(lambda x, y: np.concatenate([x, y], 1), kept, piece)
    back = position[..., None] - joined.position[:, None]
    visible = (document[..., None] == joined.document[:, None]) & (document[..., None] >= 0)
    visible &= (back >= 0) & (back < (window or 100))
    expected = numpy_attention(q, joined.keys, joined.values, visible)
    actual = attend(q, piece, kept, window=window, block=block)
    assert_close(actual, expected, 1e-6)
    np.testing.assert_array_equal(actual[1, 5:], 0)


def test_padding_gives_finite_gradients_of_zero(quick_jit):
    """Check rows that see no key, for any gradient of the output."""
    q, k, v, g = np.random.default_rng(0).standard_normal((4, 1, 4, 1, 2)).astype(np.float32)
    document = np.array([[0, 0, -1, -1]])

    def loss(q, k, v):
        return (document_attention(q, Keys(k, v, np.array([[0, 1, 2, 2]]), document)) * g).sum()

    for gradient in quick_jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 2:], 0)
        assert np.abs(gradient[:, :2]).max() > 0


def test_queries_of_a_group_share_its_head_of_values():
    v = np.broadcast_to(np.float32([1, 2])[:, None], (1, 3, 2, 4))
    y = causal_attention(np.zeros((1, 3, 4, 4), np.float32), np.zeros_like(v), v)
    np.testing.assert_array_equal(y[0, :, :, 0], [[1, 1, 2, 2]] * 3)
