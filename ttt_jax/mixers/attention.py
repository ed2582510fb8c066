"""Causal multi-head self-attention with rotary positions: the mixer of the Llama-style Transformer.

Shapes: B batch, T tokens, S length of the cache, D width, H heads, d = D / H.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.layers import rope
from ttt_jax.layers.projection import Projection, to_heads
from ttt_jax.mixers.mixer import PLAIN, Context, Memory, Mixer, Model, Style


class AttentionState(NamedTuple):
    """Keys (after RoPE) and values read so far."""

    keys: jax.Array  # [B, S, H, d]
    values: jax.Array  # [B, S, H, d]
    position: jax.Array  # tokens read so far, int32 scalar


class Attention(nn.Module):
    """``wo softmax(q k^T / sqrt(d)) v``, causal; softmax in float32."""

    num_heads: int
    dtype: jnp.dtype
    init_stddev: float = 0.02
    rope_theta: float = 10000.0

    @nn.compact
    def __call__(
        self, x: jax.Array, state: AttentionState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, AttentionState | None]:
        """Attends. A state must have room for the tokens: positions past its length are not defined."""
        del context
        batch, tokens, width = x.shape
        project = partial(to_heads, x, self.num_heads, self.dtype, self.init_stddev)
        start = jnp.zeros((), jnp.int32) if state is None else state.position
        positions = start + jnp.arange(tokens)
        q = rope.rotate(project("wq"), positions, self.rope_theta)
        k = rope.rotate(project("wk"), positions, self.rope_theta)
        v = project("wv")
        if state is None:
            y = causal_attention(q, k, v)
        else:
            keys = jax.lax.dynamic_update_slice_in_dim(state.keys, k, start, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(state.values, v, start, axis=1)
            y = cached_attention(q, keys, values, start)
            state = AttentionState(keys, values, start + tokens)
        y = y.reshape(batch, tokens, width)
        return Projection(width, ("heads", "embed"), self.dtype, self.init_stddev, name="wo")(y), state

    def initial_state(self, batch: int, width: int, length: int) -> AttentionState:
        """An empty cache for sequences of up to ``length`` tokens."""
        empty = jnp.zeros((batch, length, self.num_heads, width // self.num_heads), self.dtype)
        return AttentionState(empty, empty, jnp.zeros((), jnp.int32))

    def state_axes(self) -> AttentionState:
        """The names of the axes of the state."""
        cache, position = P("batch", "time", "num_heads", None), P()
        return AttentionState._make((cache, cache, position))


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, block: int = 256) -> jax.Array:
    """Softmax attention of each token to itself and those before it, [B, T, H, d] to [B, T, H, d].

    Queries are taken in blocks, each against the keys up to its end, so that the half of the logits that causality
    hides is not computed and the logits of the others are never all in memory. On a CPU this takes 0.4 of the time of
    ``jax.nn.dot_product_attention``. Logits and softmax are float32.
    """
    dtype, tokens, scale = q.dtype, q.shape[1], q.shape[-1] ** -0.5
    block = max(block, -(-tokens // 16))  # at most 16 blocks, to bound compile time
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, T, d]

    def attend(start: int) -> jax.Array:
        end = min(start + block, tokens)
        keys = k[:, :, :end].swapaxes(-1, -2)
        logits = scale * jnp.matmul(q[:, :, start:end], keys, preferred_element_type=jnp.float32)
        visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
        return weights.astype(dtype) @ v[:, :, :end]

    y = jnp.concatenate([attend(start) for start in range(0, tokens, block)], axis=2)
    return y.swapaxes(1, 2)


def cached_attention(q: jax.Array, keys: jax.Array, values: jax.Array, start: jax.Array, block: int = 256) -> jax.Array:
    """Softmax attention of queries [B, T, H, d], the first at position ``start``, each to the keys [B, S, H, d] of a
    cache up to its own position; [B, T, H, d].

    Queries are taken in blocks, one after the other, so that no more than ``block`` x S logits per head are in memory.
    """
    tokens, block = q.shape[1], min(block, q.shape[1])
    blocks = -(-tokens // block)
    q = jnp.pad(q, ((0, 0), (0, blocks * block - tokens), (0, 0), (0, 0)))

    def attend(first: jax.Array | int) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(q, first, block, axis=1)
        visible = jnp.arange(keys.shape[1]) <= (start + first + jnp.arange(block))[:, None]  # [block, S]
        return jax.nn.dot_product_attention(part, keys, values, mask=visible[None, None])

    if blocks == 1:
        return attend(0)[:, :tokens]
    y = jax.lax.map(attend, block * jnp.arange(blocks))  # [blocks, B, block, H, d]
    return y.swapaxes(0, 1).reshape(q.shape)[:, :tokens]


def _module(model: Model) -> Callable[..., nn.Module]:
    return partial(
        Attention,
        num_heads=model.num_heads,
        dtype=jnp.dtype(model.dtype),
        init_stddev=model.init_stddev,
        rope_theta=model.rope_theta,
    )


def _operations(model: Model, sequence_length: int) -> float:
    """Count the four projections, and the products with the keys and values that a token sees, on average."""
    visible = (sequence_length + 1) / 2
    return 4 * 2 * model.width**2 + 2 * 2 * model.width * visible


def _memory(model: Model, sequence_length: int) -> Memory:
    """Count the softmax of a token over those before it: logits in float32, weights in the compute dtype."""
    return Memory(0, 14, (4 + jnp.dtype(model.dtype).itemsize) * sequence_length / 2)


MIXERS = {
    "attention": Mixer(
        module=_module,
        operations=_operations,
        label=lambda model: "Transformer",
        styles={
            "Transformer": Style("#000000", "-.", "^"),
            "Transformer, fine-tuned": Style("#7A7A7A", (0, (6, 1, 1, 1, 1, 1)), "v"),
        },
        memory=_memory,
    ),
}
