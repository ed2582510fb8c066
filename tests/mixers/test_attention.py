"""Compare attention in blocks, in documents and with a ring with a softmax in float64, and check its positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.layers import rope
from ttt_jax.layers.context import places
from ttt_jax.mixers.attention import (
    MIXERS,
    Attention,
    AttentionState,
    Keys,
    _written,
    causal_attention,
    document_attention,
)
from ttt_jax.mixers.mixer import Context
from ttt_jax.ttt import operations


def numpy_attention(q, k, v, visible):
    """Return softmax attention to what is visible, [B, T, S]; rows that see nothing are zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (x.repeat(q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max()) * visible[:, None]
    return np.einsum("bhts,bshd->bthd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)


def seen(tokens, window=None):
    t = np.arange(tokens)
    return ((t <= t[:, None]) & (t > t[:, None] - (window or tokens)))[None]


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


def test_layer_attends_with_absolute_positions(random_params, assert_close):
    module = Attention(num_heads=2, dtype=jnp.float32, rope_theta=100.0)
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    params = random_params(module, x)
    q, k, v = ((x @ params[name]["kernel"]).reshape(2, 5, 2, 4) for name in ("wq", "wk", "wv"))
    y = numpy_attention(*(rope.rotate(a, jnp.arange(5), 100.0) for a in (q, k)), v, seen(5)).reshape(2, 5, 8)
    assert_close(module.apply({"params": params}, x)[0], y @ params["wo"]["kernel"])


def test_queries_of_a_group_share_its_head_of_values():
    v = np.broadcast_to(np.float32([1, 2])[:, None], (1, 3, 2, 4))
    y = causal_attention(np.zeros((1, 3, 4, 4), np.float32), np.zeros_like(v), v)
    np.testing.assert_array_equal(y[0, :, :, 0], [[1, 1, 2, 2]] * 3)


def test_heads_of_keys_divide_the_heads_and_are_divided_by_the_mesh():
    config = config_lib.default()
    config.model.update(mixer="sliding*2 + attention", num_heads=6, width=24, num_layers=3)
    config.model.attention.num_kv_heads = 4
    with pytest.raises(ConfigError, match=r"^model.attention.num_kv_heads=4: does not divide model.num_heads=6; expe"):
        config_lib.validate(config)
    config.model.attention.num_kv_heads = 3
    config.mesh.tensor = 2
    with pytest.raises(ConfigError, match=r"^mesh.tensor=2: does not divide the 3 heads of keys of sliding; expected"):
        config_lib.mesh_shape(config, 2)
    config.mesh.tensor = 3
    assert config_lib.mesh_shape(config, 3)["tensor"] == 3


def test_normalised_queries_and_keys_have_a_scale_for_each_feature_of_a_head(random_params, assert_close):
    module = Attention(num_heads=4, dtype=jnp.float32, num_kv_heads=2, qk_norm=True, rope_pairs="half_split")
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    params = random_params(module, x)
    assert params["q_norm"]["scale"].shape == params["k_norm"]["scale"].shape == (4,)
    q, k, v = ((x @ params[name]["kernel"]).reshape(2, 5, -1, 4) for name in ("wq", "wk", "wv"))
    normed = (
        a / np.sqrt((a.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]
        for a, name in ((q, "q_norm"), (k, "k_norm"))
    )
    rotated = (rope.rotate(a.astype(np.float32), jnp.arange(5), 10000.0, "half_split") for a in normed)
    y = numpy_attention(*rotated, v, seen(5)).reshape(2, 5, 16)
    assert_close(module.apply({"params": params}, x)[0], y @ params["wo"]["kernel"])


@pytest.fixture(scope="module")
def window_of_four(random_params, quick_jit):
    """Return a layer with a window of 4, a function that applies it, sequences of 16, and their outputs."""
    module = Attention(num_heads=2, dtype=jnp.float32, window=4)
    x = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)
    params = {"params": random_params(module, x)}
    apply = quick_jit(module.apply)
    return module, functools.partial(apply, params), x, apply(params, x)[0]


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 9])
def test_decode_matches_prefill_around_the_window(window_of_four, assert_close, prompt):
    """Read a prompt, six tokens one by one, and the rest in one piece."""
    module, apply, x, whole = window_of_four
    state, found = module.initial_state(2, 8, 16), []
    assert state.keys.shape == (2, 4, 2, 4)
    for piece in np.split(x, [prompt, *range(prompt + 1, prompt + 7)], axis=1):
        y, state = apply(piece, state)
        found.append(y)
    assert_close(np.concatenate(found, 1), whole, 1e-5)


def test_no_slot_of_a_ring_is_written_twice():
    """Check that the content of the ring does not depend on the order of writing.

    Tokens of earlier documents, tokens out of the window and padding are not written.
    """
    rng = np.random.default_rng(0)
    valid, reset = rng.random((2, 32, 9)) < np.array([0.8, 0.2])[:, None, None]
    placed = places(Context(valid, reset), 9, rng.integers(0, 6, 32).astype(np.int32))
    marks = 1.0 + np.broadcast_to(np.arange(9.0)[:, None, None], (32, 9, 1, 1))
    empty = np.zeros((32, 4, 1, 1))
    piece = Keys(marks, marks, placed.position, np.where(valid, placed.document, -1))
    state = AttentionState(empty, empty, placed.end)
    forwards = _written(state, piece, placed).keys
    np.testing.assert_array_equal(forwards, _written(state, Keys(*(x[:, ::-1] for x in piece)), placed).keys)
    for row in range(32):
        last = [t + 1.0 for t in range(9) if valid[row, t] and placed.document[row, t] == placed.document[row, -1]]
        assert sorted(forwards[row][forwards[row] > 0]) == last[-4:]


def test_a_ring_is_no_longer_than_the_sequence(window_of_four, assert_close):
    module, apply, x, whole = window_of_four
    state = module.initial_state(2, 8, 3)
    assert state.keys.shape == (2, 3, 2, 4)
    y, state = apply(x[:, :2], state)
    assert_close(np.concatenate([y, apply(x[:, 2:3], state)[0]], 1), whole[:, :3], 1e-5)


def test_each_document_may_be_as_long_as_the_cache(random_params, quick_jit, assert_close):
    """Check that earlier documents take no room in the state."""
    module = Attention(num_heads=2, dtype=jnp.float32)
    x = np.random.default_rng(0).standard_normal((1, 24, 8)).astype(np.float32)
    apply = functools.partial(quick_jit(module.apply), {"params": random_params(module, x)})
    state, found = module.initial_state(1, 8, 8), []
    reset = np.arange(24)[None] % 8 == 0
    for start in range(0, 24, 6):
        y, state = apply(x[:, start : start + 6], state, Context(reset=reset[:, start : start + 6]))
        found.append(y)
    expected = [apply(x[:, start : start + 8])[0] for start in (0, 8, 16)]
    assert_close(np.concatenate(found, 1), np.concatenate(expected, 1), 1e-5)


@pytest.mark.parametrize(("length", "window"), [(1, 4), (4, 4), (5, 4), (11, 4)])
def test_operations_count_the_keys_that_a_token_sees(length, window):
    c = config_lib.default().model
    c.attention.window = window
    products = MIXERS["sliding"].operations(c, length) - 8 * c.width**2
    c.attention.num_kv_heads = c.num_heads // 4
    assert MIXERS["sliding"].operations(c, length) == pytest.approx(products + (4 + 1) * c.width**2)
    assert products == pytest.approx(4 * c.width * np.mean([min(t, window) for t in range(1, length + 1)]))
