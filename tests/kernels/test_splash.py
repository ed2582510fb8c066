"""Compare splash attention, interpreted, with attention in blocks and with a softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.kernels import splash
from ttt_jax.layers.blocked_attention import causal_attention


def inputs(tokens, heads=2, groups=2, width=64):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, tokens, n, width)).astype(np.float32) for n in (heads, groups, groups, heads)]


@pytest.mark.parametrize(
    ("tokens", "groups", "window"),
    [(130, 2, None), (256, 1, 100), pytest.param(257, 1, 2, marks=pytest.mark.slow)],
)
def test_outputs_and_gradients_match_attention_in_blocks(assert_close, tokens, groups, window):
    """Check lengths that are no multiple of a block, grouped queries, and windows, in float32."""
    *qkv, g = inputs(tokens, groups=groups)
    kernel = functools.partial(splash.causal_attention, window=window, interpret=True)
    y, pull = jax.vjp(kernel, *qkv)
    expected, expected_pull = jax.vjp(functools.partial(causal_attention, window=window), *qkv)
    assert_close(y, expected, 1e-5)
    assert_close(pull(g), expected_pull(g), 1e-5)


@pytest.mark.parametrize(("tokens", "expected"), [(1, (128, 128)), (130, (128, 256)), (1000, (1024, 1024))])
def test_blocks_leave_little_padding(tokens, expected):
    assert splash._block(tokens) == expected


@pytest.mark.parametrize("tokens", [640, 2048, 2049, 5000, 32768])
def test_padding_is_an_eighth_at_most(tokens):
    block, padded = splash._block(tokens)
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
    with pytest.raises(ValueError, match=r"^there is none for cpu$"):
        splash.choose("splash", long, 64, bfloat16, "cpu")


def test_what_the_kernel_is_not_used_for():
    assert splash.unsupported(64, jnp.dtype(jnp.bfloat16)) is None
    assert "float32" in splash.unsupported(64, jnp.dtype(jnp.float32))
    assert "48 features" in splash.unsupported(48, jnp.dtype(jnp.bfloat16))
