"""Compare attention in blocks, in documents and beside kept keys with a softmax in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import numpy_attention, numpy_gradients, seen

from ttt_jax.layers.blocked_attention import NO_DOCUMENT, Keys, _blocks, causal_attention, document_attention
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


@hypothesis.given(st.integers(1, 700), st.none() | st.integers(1, 800), st.integers(1, 300))
def test_blocks_hold_each_query_once_and_all_keys_that_it_sees(tokens, window, block):
    found = _blocks(tokens, window, block)
    assert len(found) <= 16
    assert [t for _, start, end in found for t in range(start, end)] == list(range(tokens))
    visible = seen(tokens, window)[0]
    for first, start, end in found:
        assert visible[start:end].any(0).nonzero()[0].tolist() == list(range(first, end))


@pytest.mark.slow
@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(1, 40), st.none() | st.integers(1, 44), st.integers(1, 44), st.sampled_from([1, 2, 4]))
def test_masks_and_gradients_match_brute_force(quick_jit, assert_close, tokens, window, block, groups):
    """Draw the numbers of tokens, of tokens in a window, of queries in a block and of heads of keys."""
    q, k, v, g = np.random.default_rng(0).standard_normal((4, 1, tokens, 4, 6)).astype(np.float32)
    k, v = k[:, :, :groups], v[:, :, :groups]

    @quick_jit
    def run(q, k, v, g):
        y, pull = jax.vjp(functools.partial(causal_attention, window=window, block=block), q, k, v)
        return y, pull(g)

    y, gradients = run(q, k, v, g)
    visible = seen(tokens, window)
    assert_close(y, numpy_attention(q, k, v, visible), 2e-6)
    assert_close(gradients, numpy_gradients(q, k, v, visible, g), 5e-6)


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


PIECE, SLOTS = 9, 6


@st.composite
def pieces_with_state(draw, window):
    """Draw documents, padding and a ring of kept keys, as :mod:`ttt_jax.mixers.attention` makes them.

    Positions count the tokens of a document; without a window, padding may be anywhere. The last S tokens of the
    document that continues are kept, in a ring that begins anywhere.
    """
    before = draw(st.integers(0, 9))  # tokens of the document that continues
    if window is None:
        real = np.array(draw(st.lists(st.booleans(), min_size=PIECE, max_size=PIECE)))
    else:
        real = np.arange(PIECE) < draw(st.integers(0, PIECE))
    begins = np.array(draw(st.lists(st.sampled_from([False, False, True]), min_size=PIECE, max_size=PIECE))) & real
    document = np.cumsum(begins)
    position, at = [], before
    for r, b in zip(real, begins, strict=True):
        at = 0 if b else at
        position.append(at)
        at += r
    last = before - 1
    kept_position = last - (last - np.arange(SLOTS)) % SLOTS
    kept_document = np.where(kept_position >= 0, 0, NO_DOCUMENT)
    return np.array(position), np.where(real, document, NO_DOCUMENT), kept_position, kept_document


@functools.cache
def output_and_gradients(window, block, kept):
    """Return a compiled function of arrays: the output, and the gradients of all keys, values and queries."""

    def run(q, k, v, g, marks, kept_k, kept_v):
        def attend(q, k, v, kept_k, kept_v):
            ring = Keys(kept_k, kept_v, *marks[2:]) if kept else None
            return document_attention(q, Keys(k, v, *marks[:2]), ring, window, block)

        y, pull = jax.vjp(attend, q, k, v, kept_k, kept_v)
        return y, pull(g)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(("window", "block", "kept"), [(None, 4, True), (3, 4, True), (1, 9, True), (8, 2, False)])
def test_documents_padding_and_kept_keys_match_brute_force(assert_close, window, block, kept):
    """Check outputs and gradients for any documents, padding and ring: what sees nothing gives 0, and gets 0."""

    @hypothesis.settings(max_examples=25)
    @hypothesis.given(st.data())
    def check(data):
        marks = [x[None].astype(np.int32) for x in data.draw(pieces_with_state(window))]
        position, document, kept_position, kept_document = marks
        rng = np.random.default_rng(data.draw(st.integers(0, 9)))
        q, g = rng.standard_normal((2, 1, PIECE, 2, 4)).astype(np.float32)
        k, v = rng.standard_normal((2, 1, PIECE, 1, 4)).astype(np.float32)
        kept_k, kept_v = rng.standard_normal((2, 1, SLOTS, 1, 4)).astype(np.float32)
        y, gradients = output_and_gradients(window, block, kept)(q, k, v, g, marks, kept_k, kept_v)

        all_k, all_v = (np.concatenate(pair, 1) for pair in ((k, kept_k), (v, kept_v)))
        of_key = np.concatenate([document, kept_document if kept else np.full_like(kept_document, NO_DOCUMENT)], 1)
        back = position[..., None] - np.concatenate([position, kept_position], 1)[:, None]
        visible = (document[..., None] == of_key[:, None]) & (document != NO_DOCUMENT)[..., None]
        visible &= (back >= 0) & (back < (window or 1000))
        dq, dk, dv = numpy_gradients(q, all_k, all_v, visible, g)
        split = (*np.split(dk, [PIECE], 1), *np.split(dv, [PIECE], 1))
        assert_close(y, numpy_attention(q, all_k, all_v, visible), 2e-6)
        assert_close(gradients, (dq, split[0], split[2], split[1], split[3]), 5e-6)
        np.testing.assert_array_equal(np.asarray(y)[~visible.any(-1)], 0)
        np.testing.assert_array_equal(np.asarray(gradients[0])[~visible.any(-1)], 0)
        np.testing.assert_array_equal(np.concatenate(gradients[1::2], 1)[~visible.any(1)], 0)
        np.testing.assert_array_equal(np.concatenate(gradients[2::2], 1)[~visible.any(1)], 0)

    check()


def test_a_window_ends_at_the_query_where_more_keys_are_kept(quick_jit):
    """Check one query and six keys: a window of two is the last two of them, not the first."""
    values = np.eye(6, dtype=np.float32)[None, :, None]
    marks = np.arange(6)[None], np.zeros((1, 6), int)
    everything = Keys(np.zeros_like(values), values, *marks)
    kept, piece = (Keys(*x) for x in zip(*(np.split(x, [5], 1) for x in everything), strict=True))
    weights = quick_jit(document_attention, static_argnames="window")(np.zeros((1, 1, 1, 6)), piece, kept, window=2)
    np.testing.assert_allclose(weights[0, 0, 0], [0, 0, 0, 0, 0.5, 0.5])


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


def test_heads_that_are_not_divided_by_those_of_keys_are_refused():
    q, k = np.zeros((1, 3, 3, 4), np.float32), np.zeros((1, 3, 2, 4), np.float32)
    with pytest.raises(TypeError, match="reshape"):
        jax.eval_shape(causal_attention, q, k, k)
