"""Causality of every mixer by gradients: token t hears of s <= t, and of nothing else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.mixers.attention import Attention
from ttt_jax.mixers.linear_attention import LinearAttention
from ttt_jax.mixers.ttt import TTT
from ttt_jax.models.block import Block
from ttt_jax.ttt.inner_loop import ttt_linear, ttt_mlp

TOKENS, WIDTH, HEADS, B = 6, 8, 2, 3
LOOPS = {"linear": ttt_linear(WIDTH // HEADS), "mlp": ttt_mlp(WIDTH // HEADS)}
MIXERS = {
    "attention": partial(Attention, HEADS, jnp.float32),
    "linear_attention": partial(LinearAttention, HEADS, jnp.float32),
    **{
        f"ttt_{name}-{backbone}": partial(TTT, loop, HEADS, jnp.float32, backbone, mini_batch=B)
        for name, loop in LOOPS.items()
        for backbone in ("mamba", "transformer")
    },
}


def influence(quick_jit, f):
    """|d output[t] / d input[s]|, [T, T]."""
    rng = np.random.default_rng(0)
    x, direction = rng.standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    jacobian = quick_jit(jax.jacrev(lambda x: (f(x[None])[0] * direction).sum(-1)))(x)  # [T, T, D]
    return np.abs(jacobian).max(-1)


def assert_lower_triangle(influence):
    future = np.triu(np.ones((TOKENS, TOKENS), bool), 1)
    np.testing.assert_array_equal(influence[future], 0)
    assert influence[~future].min() > 1e-6


@pytest.mark.parametrize("name", MIXERS)
def test_mixer(random_params, quick_jit, name):
    mixer = MIXERS[name]()
    params = random_params(mixer, np.zeros((1, TOKENS, WIDTH), np.float32))
    assert_lower_triangle(influence(quick_jit, lambda x: mixer.apply({"params": params}, x)[0]))


def test_block_with_a_convolution_before_its_mixer(random_params, quick_jit):
    block = Block(MIXERS["attention"], mlp_width=4, dtype=jnp.float32, init_stddev=0.02, pre_conv=True)
    params = random_params(block, np.zeros((1, TOKENS, WIDTH), np.float32))
    assert_lower_triangle(influence(quick_jit, lambda x: block.apply({"params": params}, x)[0]))
