"""Attend linearly, in the simplest form: attention without the softmax, which is a sum of outer products.

    S_t = S_{t-1} + k_t v_t^T        z_t = q_t S_t / (2 d t)

There is no feature map and no normaliser; rotary positions and the LN of the output are as in TTT layers of the
Transformer backbone. This is the TTT layer whose learner is linear, starts at W0 = 0 and takes one step of batch
gradient descent over the whole sequence (Theorem 1 of the paper), at the initial rate of TTT layers, eta = 1 / (2 d t).
The factor makes the sum a mean, which is the same to the LN except for its epsilon.

Shapes: B batch, T tokens, D width, H heads, d = D / H, c tokens of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.layers import rope
from ttt_jax.layers.context import places
from ttt_jax.layers.linear import Projection, to_heads
from ttt_jax.layers.norm import post_norm
from ttt_jax.mixers.mixer import PLAIN, Context, Memory, Mixer, Model, Style, head_options

CHUNK = 128  # tokens


class LinearAttentionState(NamedTuple):
    """The sums over the tokens read so far."""

    sums: jax.Array  # S, [B, H, d, d], float32
    position: jax.Array  # tokens of the present document read so far, int32 [B]


class LinearAttention(nn.Module):
    """``wo LN(z)``, causal; sums in float32."""

    num_heads: int
    dtype: jnp.dtype
    init_stddev: float = 0.02
    rope_theta: float = 10000.0

    @nn.compact
    def __call__(
        self, x: jax.Array, state: LinearAttentionState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, LinearAttentionState | None]:
        """Return y [B, T, D], and the state after x where one is given."""
        batch, tokens, width = x.shape
        project = partial(to_heads, x, self.num_heads, self.dtype, self.init_stddev)
        placed = places(context, tokens, None if state is None else state.position)
        positions = jnp.arange(tokens) if placed is None else placed.position  # [T] or [B, T]
        q = rope.rotate(project("wq"), positions, self.rope_theta)  # [B, T, H, d]
        k = rope.rotate(project("wk"), positions, self.rope_theta)
        sums = (self.initial_state(batch, width, tokens) if state is None else state).sums
        document = None if placed is None or context.reset is None else placed.document
        z, sums = linear_attention(q, context.blank(k), project("wv"), sums, document)  # z: [B, T, H, d]
        z /= 2 * (width // self.num_heads) * (positions + 1)[..., None, None]
        z = post_norm()(z.astype(self.dtype).reshape(x.shape))
        y = Projection(width, ("heads", "embed"), self.dtype, self.init_stddev, name="wo")(z)
        return context.blank(y), None if placed is None or state is None else LinearAttentionState(sums, placed.end)

    def initial_state(self, batch: int, width: int, length: int) -> LinearAttentionState:
        """Return the state before the first token; its size does not depend on ``length``."""
        del length
        d = width // self.num_heads
        return LinearAttentionState(jnp.zeros((batch, self.num_heads, d, d)), jnp.zeros(batch, jnp.int32))

    def state_axes(self) -> LinearAttentionState:
        """Return the names of the axes of the state."""
        return LinearAttentionState._make((P("batch", "num_heads", None, None), P("batch")))


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sums: jax.Array,
    document: jax.Array | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return ``q_t S_t`` [B, T, H, d] and S after the last token, both float32.

    This is a scan over chunks of c tokens. Tokens of the same chunk are read by products of queries and keys, tokens
    before it by the sums.

    Args:
      q, k, v: [B, T, H, d].
      sums: S before the first token, [B, H, d, d].
      document: [B, T], the index of each token's document; 0 is the one that ``sums`` is of. None: all are of one.
      chunk: c.
    """
    tokens = q.shape[1]
    c = min(chunk, tokens)
    n = -(-tokens // c)

    def chunks(x):  # [B, T, H, d] -> [n, B, H, c, d]; keys of zero add nothing
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, n * c - tokens), (0, 0), (0, 0)))
        return x.reshape(x.shape[0], n, c, *x.shape[2:]).transpose(1, 0, 3, 2, 4)

    def step(sums, x):
        q, k, v = x
        z = q @ sums + jnp.tril(q @ k.swapaxes(-1, -2)) @ v
        return sums + k.swapaxes(-1, -2) @ v, z

    def step_of_documents(sums, x):
        (q, k, v), own, before = x  # documents: own [B, 1, c, 1] of the tokens, before [B, 1, 1, 1] of the sums
        last = own[:, :, -1:]
        logits = jnp.where(own == own.swapaxes(-1, -2), jnp.tril(q @ k.swapaxes(-1, -2)), 0)
        z = jnp.where(own == before, q @ sums, 0) + logits @ v
        return jnp.where(last == before, sums, 0) + jnp.where(own == last, k, 0).swapaxes(-1, -2) @ v, z

    xs = (chunks(q), chunks(k), chunks(v))
    if document is None:
        sums, z = jax.lax.scan(step, sums, xs)
    else:
        own = jnp.pad(document, ((0, 0), (0, n * c - tokens)), "edge")
        own = own.reshape(len(own), n, c).swapaxes(0, 1)[:, :, None, :, None]  # [n, B, 1, c, 1]
        before = jnp.concatenate([jnp.zeros_like(own[:1, :, :, -1:]), own[:-1, :, :, -1:]])
        sums, z = jax.lax.scan(step_of_documents, sums, (xs, own, before))
    z = z.transpose(1, 0, 3, 2, 4).reshape(q.shape[0], n * c, *q.shape[2:])
    return z[:, :tokens], sums


def _module(model: Model) -> Callable[..., nn.Module]:
    return partial(
        LinearAttention,
        **head_options(model),
    )


def _operations(model: Model, sequence_length: int) -> float:
    """Count the four projections, and for each head q S, k^T v, and within the chunk q k^T and its product with v."""
    d, chunk = model.width // model.num_heads, min(CHUNK, sequence_length)
    return 4 * 2 * model.width**2 + model.num_heads * (2 * 2 * d**2 + 2 * 2 * chunk * d)


MIXERS = {
    "linear_attention": Mixer(
        module=_module,
        operations=_operations,
        label=lambda model: "Linear attention",
        styles={"Linear attention": Style("#CC79A7", (0, (1, 1)), "X")},
        memory=lambda model, sequence_length: Memory(0, 25),
    ),
}
