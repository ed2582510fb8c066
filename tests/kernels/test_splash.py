"""Compare splash attention, interpreted, with attention in blocks and with a softmax in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import numpy_attention, numpy_gradients, seen

from ttt_jax.kernels import splash
from ttt_jax.layers.blocked_attention import causal_attention


def inputs(tokens, heads=2, groups=2, width=64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, tokens, n, width)).astype(np.float32) for n in (heads, groups, groups, heads)]


@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "window"),
    [(192, 2, 2, None), (256, 4, 2, 100), pytest.param(257, 2, 1, 2, marks=pytest.mark.slow)],
)
def test_outputs_and_gradients_match_attention_in_blocks(assert_close, tokens, heads, groups, window):
    """Check lengths that are no multiple of a block, grouped queries, and windows, in float32."""
    *qkv, g = inputs(tokens, heads, groups)
    kernel = functools.partial(splash.causal_attention, window=window, interpret=True)
    y, pull = jax.vjp(kernel, *qkv)
    expected, expected_pull = jax.vjp(functools.partial(causal_attention, window=window), *qkv)
    assert_close(y, expected, 1e-5)
    assert_close(pull(g), expected_pull(g), 1e-5)


@pytest.mark.slow
def test_a_window_includes_the_token_itself():
    x, v = np.zeros((1, 5, 1, 64), np.float32), np.eye(5, 64, dtype=np.float32)[None, :, None]
    weights = splash.causal_attention(x, x, v, window=2, interpret=True)[0, :, 0, :5]
    np.testing.assert_allclose(weights[0], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(weights[1:], 0.5 * (np.eye(4, 5) + np.eye(4, 5, 1)))


@pytest.mark.slow
@hypothesis.settings(max_examples=5)
@hypothesis.given(st.integers(1, 300), st.none() | st.integers(1, 310), st.sampled_from([1, 2, 4]))
def test_masks_and_gradients_match_brute_force(assert_close, tokens, window, groups):
    """Draw the numbers of tokens, of tokens in a window, and of heads of keys."""
    *qkv, g = inputs(tokens, heads=4, groups=groups)
    y, pull = jax.vjp(functools.partial(splash.causal_attention, window=window, interpret=True), *qkv)
    visible = seen(tokens, window)
    assert_close(y, numpy_attention(*qkv, visible), 1e-5)
    # A token that sees itself alone gives its query no gradient, up to the rounding of much larger sums.
    together = [np.concatenate([np.ravel(x) for x in found]) for found in (pull(g), numpy_gradients(*qkv, visible, g))]
    assert_close(*together, 1e-5)


@pytest.mark.parametrize(
    ("tokens", "groups", "window"), [(192, 1, None), pytest.param(300, 2, 20, marks=pytest.mark.slow)]
)
def test_tokens_see_their_own_document(assert_close, tokens, groups, window):
    """Check documents that begin within a block, one of a single token, and rows with other documents."""
    *qkv, g = (np.concatenate([x, x[:, ::-1]]) for x in inputs(tokens, groups=groups))
    begins = np.zeros((2, tokens), int)
    begins[0, [50, 51, 130]] = begins[1, [128]] = 1
    documents = begins.cumsum(1)
    visible = seen(tokens, window) & (documents[:, :, None] == documents[:, None])
    attend = functools.partial(splash.causal_attention, window=window, documents=documents, interpret=True)
    y, pull = jax.vjp(attend, *qkv)
    assert_close(y, numpy_attention(*qkv, visible), 1e-5)
    assert_close(pull(g), numpy_gradients(*qkv, visible, g), 2e-5)


def errors(actual, rows, q, k, v, window):
    """Return the largest error of each of some rows, as a part of the row's largest entry in float64."""
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    back = rows[:, None] - np.arange(len(k))
    logits = np.where((back >= 0) & (back < (window or len(k))), q[rows] @ k.T / 8, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected = weights @ v / weights.sum(-1, keepdims=True)
    actual = np.asarray(actual, np.float64)[0, rows, 0]
    return np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "window", "dtype", "tolerance"),
    [(32_768, None, "float32", 1e-5), (16_384, 4096, "float32", 1e-5), (5000, None, "bfloat16", 6e-3)],
)
def test_errors_do_not_grow_with_the_position(tokens, window, dtype, tolerance):
    """Compare every 127th row with float64, relative to its own largest entry, which falls with the position."""
    q, k, v, _ = (jnp.asarray(x, dtype) for x in inputs(tokens, heads=1, groups=1))
    y = splash.causal_attention(3 * q, k, v, window, interpret=True)
    rows = np.union1d(np.arange(0, tokens, 127), [tokens - 1])
    found = errors(y, rows, 3 * q, k, v, window)
    assert found.max() < tolerance
    first, *_, last = np.array_split(found, 8)
    assert np.median(last) < 3 * np.median(first)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 700])
def test_gradients_over_several_blocks_match_float64(assert_close, window):
    """Check five blocks of queries and of keys, the last of which are not full."""
    *qkv, g = inputs(2300, heads=2, groups=1)
    _, pull = jax.vjp(functools.partial(splash.causal_attention, window=window, interpret=True), *qkv)
    assert_close(pull(g), numpy_gradients(*qkv, seen(2300, window), g), 2e-5)


def test_heads_that_are_not_divided_by_those_of_keys_are_refused():
    q, k = (jnp.zeros((1, 128, heads, 64)) for heads in (3, 2))
    with pytest.raises(ValueError, match="heads"):
        jax.eval_shape(functools.partial(splash.causal_attention, interpret=True), q, k, k)


@pytest.mark.parametrize(("tokens", "expected"), [(1, (128, 128)), (130, (128, 256)), (1000, (1024, 1024))])
def test_blocks_leave_little_padding(tokens, expected):
    assert splash.blocks(tokens) == expected


@pytest.mark.parametrize("tokens", [640, 2048, 2049, 5000, 32768])
def test_padding_is_an_eighth_at_most(tokens):
    block, padded = splash.blocks(tokens)
    assert padded % block == 0
    assert tokens <= padded <= tokens * 9 / 8


def test_the_choice_of_the_kernel():
    bfloat16, long = jnp.dtype(jnp.bfloat16), splash.FROM_TOKENS
    assert splash.choose("auto", long, 64, bfloat16, "TPU v5 lite")
    assert splash.choose("splash", 128, 64, bfloat16, "TPU v5 lite")
    assert not splash.choose("auto", long - 1, 64, bfloat16, "TPU v5 lite")
    assert not splash.choose("auto", long, 64, bfloat16, "cpu")
    assert not splash.choose("auto", long, 64, jnp.dtype(jnp.float32), "TPU v5 lite")
    assert not splash.choose("xla", long, 64, bfloat16, "TPU v5 lite")
    assert not splash.choose("auto", splash.MOST_TOKENS + 1, 64, bfloat16, "TPU v5 lite")
    assert splash.choose("auto", splash.MOST_TOKENS + 1, 64, bfloat16, "TPU v5 lite", 4096)
    with pytest.raises(ValueError, match=r"^tokens see up to 65537 tokens, and the kernel takes 65536$"):
        splash.choose("splash", splash.MOST_TOKENS + 1, 64, bfloat16, "TPU v5 lite")
    with pytest.raises(ValueError, match=r"^there is none for cpu$"):
        splash.choose("splash", long, 64, bfloat16, "cpu")


def test_what_the_kernel_is_not_used_for():
    assert splash.unsupported(64, jnp.dtype(jnp.bfloat16)) is None
    assert "float32" in splash.unsupported(64, jnp.dtype(jnp.float32))
    assert "48 features" in splash.unsupported(48, jnp.dtype(jnp.bfloat16))
