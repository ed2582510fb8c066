"""Attend causally with multiple heads and rotary positions: the mixer of the Llama-style Transformer.

Tokens see all tokens of their document up to themselves, or those within a window (``sliding``). There may be fewer
heads of keys and values than of queries: heads g R to g R + R - 1 of the queries share the keys and values of head g.
The state is a ring of keys and values, in which position p lies in slot p mod S. With a window, S is at most the
window.

Shapes: B batch, T tokens, S slots of the state, D width, H heads, G heads of keys and values, R = H / G, d = D / H.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.errors import ConfigError
from ttt_jax.layers import rope
from ttt_jax.layers.context import Places, gather_valid, places
from ttt_jax.layers.linear import Projection, to_heads
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.mixers.mixer import PLAIN, Context, Memory, Mixer, Model, Style, head_options
from ttt_jax.settings import setting

_NO_DOCUMENT = -1  # the document of keys that no query sees


class AttentionState(NamedTuple):
    """Keys (after RoPE) and values read so far."""

    keys: jax.Array  # [B, S, G, d]
    values: jax.Array  # [B, S, G, d]
    position: jax.Array  # tokens of the present document read so far, int32 [B]


class Attention(nn.Module):
    """``wo softmax(q k^T / sqrt(d)) v``, causal; softmax in float32.

    Attributes:
      window: the number of tokens that a token sees, including itself; None: all of its document up to itself.
      num_kv_heads: G, a divisor of H; None: H.
      qk_norm: whether queries and keys are normalised before they are rotated, with a scale per feature of a head.
      rope_pairs: which features are rotated together (:mod:`ttt_jax.layers.rope`).
    """

    num_heads: int
    dtype: jnp.dtype
    init_stddev: float = 0.02
    rope_theta: float = 10000.0
    window: int | None = None
    num_kv_heads: int | None = None
    qk_norm: bool = False
    rope_pairs: str = "interleaved"
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: jax.Array, state: AttentionState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, AttentionState | None]:
        """Attend. Without a window, the state must have room for all tokens of a document."""
        _, tokens, width = x.shape
        gathered = None
        if self.window is not None and context.valid is not None:
            gathered = gather_valid(context.valid, context)  # so that the tokens of a window are adjacent
            x, context = gathered.take(x), gathered.context
        placed = places(context, tokens, None if state is None else state.position)
        positions = jnp.arange(tokens) if placed is None else placed.position  # [T] or [B, T]
        q = self._rotated("q_norm", self._heads("wq", x, self.num_heads), positions)  # [B, T, H, d]
        k = self._rotated("k_norm", self._heads("wk", x, self._groups), positions)  # [B, T, G, d]
        v = self._heads("wv", x, self._groups)
        if placed is None:
            y = causal_attention(q, k, v, self.window)
        else:
            document = placed.document
            if context.valid is not None:
                document = jnp.where(context.valid, document, _NO_DOCUMENT)
            piece = Keys(k, v, placed.position, document)
            y = document_attention(q, piece, None if state is None else _kept(state), self.window)
            state = None if state is None else _written(state, piece, placed)
        y = Projection(width, ("heads", "embed"), self.dtype, self.init_stddev, name="wo")(y.reshape(x.shape))
        return y if gathered is None else gathered.back(y), state

    def initial_state(self, batch: int, width: int, length: int) -> AttentionState:
        """Return an empty ring for documents of up to ``length`` tokens."""
        slots = length if self.window is None else min(length, self.window)
        empty = jnp.zeros((batch, slots, self._groups, width // self.num_heads), self.dtype)
        return AttentionState(empty, empty, jnp.zeros(batch, jnp.int32))

    def state_axes(self) -> AttentionState:
        """Return the names of the axes of the state."""
        slots = "time" if self.window is None else "window"
        ring = P("batch", slots, "num_heads", None)
        return AttentionState._make((ring, ring, P("batch")))

    @property
    def _groups(self) -> int:
        return self.num_kv_heads or self.num_heads

    def _heads(self, name: str, x: jax.Array, heads: int) -> jax.Array:
        features = heads * (x.shape[-1] // self.num_heads)
        return to_heads(x, heads, self.dtype, self.init_stddev, name, features)

    def _rotated(self, norm: str, x: jax.Array, positions: jax.Array) -> jax.Array:
        if self.qk_norm:
            x = RMSNorm(self.dtype, self.norm_epsilon, name=norm)(x)
        return rope.rotate(x, positions, self.rope_theta, self.rope_pairs)


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None, block: int = 256
) -> jax.Array:
    """Return softmax attention of each token to itself and earlier ones, [B, T, H, d].

    Queries are taken in blocks, each against the keys that its queries see, so that the half of the logits that
    causality hides is not computed, and the other half is never all in memory. On a CPU this takes 0.4 of the time of
    ``jax.nn.dot_product_attention``. Logits and softmax are float32.

    Args:
      q: [B, T, H, d].
      k, v: [B, T, G, d], where G divides H.
      window: the number of tokens that a token sees, including itself; None: all.
      block: queries per block; more where there would be more than 16 blocks.
    """
    queries = _Queries(q, k.shape[2])
    k, v = (x.swapaxes(1, 2) for x in (k, v))  # [B, G, T, d]

    def attend(first: int, start: int, end: int) -> jax.Array:
        logits = queries.logits(start, end, k[:, :, first:end].swapaxes(-1, -2))
        visible = jnp.arange(first, end) <= jnp.arange(start, end)[:, None]
        if window is not None:
            visible &= jnp.arange(first, end) > jnp.arange(start, end)[:, None] - window
        weights = jax.nn.softmax(jnp.where(visible, logits, -jnp.inf))
        return queries.weighted(weights, v[:, :, first:end])

    return queries.joined([attend(*each) for each in _blocks(q.shape[1], window, block)])


class _Queries:
    """Queries [B, T, H, d] in G groups, whose products with keys are one matrix product for each group.

    The queries of a block of t tokens are R t rows of a matrix, [B, G, R t, d].
    """

    def __init__(self, q: jax.Array, groups: int):
        batch, tokens, heads, width = q.shape
        self._q = q.swapaxes(1, 2).reshape(batch, groups, heads // groups, tokens, width)  # [B, G, R, T, d]

    def logits(self, start: int, end: int, keys: jax.Array) -> jax.Array:
        """Return the logits of a block of tokens for keys [B, G, d, S], [B, G, R, t, S], float32."""
        q = self._q[:, :, :, start:end]
        rows = q.reshape(*q.shape[:2], -1, q.shape[-1])
        product = jnp.matmul(rows, keys, preferred_element_type=jnp.float32)
        return q.shape[-1] ** -0.5 * product.reshape(*q.shape[:-1], -1)

    def weighted(self, weights: jax.Array, values: jax.Array) -> jax.Array:
        """Return the sums of values [B, G, S, d] with weights [B, G, R, t, S], as [B, G, R, t, d]."""
        rows = weights.astype(self._q.dtype).reshape(*weights.shape[:2], -1, weights.shape[-1])
        return (rows @ values).reshape(*weights.shape[:-1], -1)

    def joined(self, blocks: Sequence[jax.Array]) -> jax.Array:
        """Return the outputs of all blocks, [B, T, H, d]."""
        y = jnp.concatenate(blocks, axis=3)
        return y.reshape(y.shape[0], -1, *y.shape[3:]).swapaxes(1, 2)


class Keys(NamedTuple):
    """Keys and values with their positions and documents; keys without a document are not seen."""

    keys: jax.Array  # [B, S, G, d]
    values: jax.Array  # [B, S, G, d]
    position: jax.Array  # [B, S]
    document: jax.Array  # [B, S]


def document_attention(
    q: jax.Array, piece: Keys, kept: Keys | None = None, window: int | None = None, block: int = 256
) -> jax.Array:
    """Return softmax attention of queries [B, T, H, d] to the keys that they see of their document, [B, T, H, d].

    The queries have the positions and documents of the keys of their piece; without a document a query sees nothing,
    and y is 0 there. Keys kept from earlier pieces are seen beside those of the piece, under one softmax and without
    copying either. Blocks and dtypes are those of :func:`causal_attention`. With a window, padding must be behind all
    other tokens.
    """
    queries = _Queries(q, piece.keys.shape[2])

    def attend(first: int, start: int, end: int) -> jax.Array:
        position, document = (x[:, start:end, None] for x in (piece.position, piece.document))
        groups = [jax.tree.map(lambda x: x[:, first:end], piece)]
        groups += [] if kept is None else [kept]
        logits = []
        for group in groups:
            back = position - group.position[:, None]  # [B, t, S]
            seen = (document == group.document[:, None]) & (back >= 0)
            seen = seen if window is None else seen & (back < window)
            found = queries.logits(start, end, group.keys.transpose(0, 2, 3, 1))
            logits.append(jnp.where(seen[:, None, None], found, jnp.finfo(jnp.float32).min))
        weights = zip(_softmax(logits), groups, strict=True)
        y = sum(queries.weighted(w, group.values.swapaxes(1, 2)) for w, group in weights)
        return jnp.where((document != _NO_DOCUMENT)[:, None, None], y, 0)

    return queries.joined([attend(*each) for each in _blocks(q.shape[1], window, block)])


def _softmax(logits: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the softmax over the last axes of all groups together, without concatenating them."""
    largest = functools.reduce(jnp.maximum, [x.max(-1, keepdims=True) for x in logits])
    powers = [jnp.exp(x - jax.lax.stop_gradient(largest)) for x in logits]
    total = sum(x.sum(-1, keepdims=True) for x in powers)
    return [x / total for x in powers]


def _blocks(tokens: int, window: int | None, block: int) -> list[tuple[int, int, int]]:
    """Return, for each block of queries, the first key that one of them sees, and the start and end of the block."""
    block = max(block, -(-tokens // 16))  # at most 16 blocks, to bound compile time
    starts = range(0, tokens, block)
    return [(0 if window is None else max(0, s + 1 - window), s, min(s + block, tokens)) for s in starts]


def _kept(state: AttentionState) -> Keys:
    """Return the keys that the ring holds of the document that continues: its last S positions."""
    slots = state.keys.shape[1]
    last = state.position[:, None] - 1
    position = last - (last - jnp.arange(slots)) % slots
    return Keys(state.keys, state.values, position, jnp.where(position >= 0, 0, _NO_DOCUMENT))


def _written(state: AttentionState, piece: Keys, placed: Places) -> AttentionState:
    """Return the ring after a piece, with the last S tokens of the piece's last document."""
    slots = state.keys.shape[1]
    stays = (piece.document == placed.document[:, -1:]) & (piece.position >= placed.end[:, None] - slots)
    slot = jnp.where(stays, piece.position % slots, slots)  # writes to slot S, which does not exist, are dropped

    @jax.vmap
    def write(ring, new, slot):
        return ring.at[slot].set(new, mode="drop")

    return AttentionState(write(state.keys, piece.keys, slot), write(state.values, piece.values, slot), placed.end)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section ``model.attention``."""

    window: int = setting(1024, "sliding: tokens that a token sees, including itself", least=1)
    num_kv_heads: int | None = setting(
        None, "heads of keys and values, a divisor of num_heads; unset: num_heads", least=1
    )
    qk_norm: bool = setting(
        False, "normalise queries and keys before they are rotated, with a scale per feature of a head"
    )
    rope_pairs: str = setting(
        "interleaved", "features that are rotated together: 2j and 2j + 1, or j and j + d/2", among=rope.PAIRS
    )


def _module(model: Model, window: int | None = None) -> Callable[..., nn.Module]:
    return partial(
        Attention,
        **head_options(model),
        window=window,
        num_kv_heads=model.attention.num_kv_heads,
        qk_norm=model.attention.qk_norm,
        rope_pairs=model.attention.rope_pairs,
        norm_epsilon=model.norm_epsilon,
    )


def _check(model: Model) -> None:
    groups = model.attention.num_kv_heads
    if groups is not None and model.num_heads % groups:
        raise ConfigError(
            f"model.attention.num_kv_heads={groups}: does not divide model.num_heads={model.num_heads}; "
            "expected a divisor"
        )


def _groups(model: Model) -> int:
    return model.attention.num_kv_heads or model.num_heads


def _seen(sequence_length: int, window: int | None = None) -> float:
    """Return the number of tokens that a token sees, on average."""
    inside = sequence_length if window is None else min(sequence_length, window)
    return (inside * (inside + 1) / 2 + (sequence_length - inside) * inside) / sequence_length


def _operations(model: Model, seen: float) -> float:
    """Count the four projections, and the products with the keys and values that a token sees."""
    shared = _groups(model) / model.num_heads
    return (2 + 2 * shared) * 2 * model.width**2 + 2 * 2 * model.width * seen


def _memory(model: Model, seen: float) -> Memory:
    """Count the softmax over the tokens that a token sees: logits in float32, weights in the compute dtype."""
    left_out = round(
        2 * (1 - _groups(model) / model.num_heads) * model.width**2
    )  # of the projections to keys and values
    return Memory(-left_out, 14, (4 + jnp.dtype(model.dtype).itemsize) * seen)


_FULL = Mixer(
    module=_module,
    operations=lambda model, length: _operations(model, _seen(length)),
    label=lambda model: "Transformer",
    section="attention",
    settings=Settings,
    check=_check,
    heads=_groups,
    memory=lambda model, length: _memory(model, _seen(length)),
)
MIXERS = {
    "attention": dataclasses.replace(
        _FULL,
        unused=("window",),
        styles={
            "Transformer": Style("#000000", "-.", "^"),
            "Transformer, fine-tuned": Style("#7A7A7A", (0, (6, 1, 1, 1, 1, 1)), "v"),
        },
    ),
    "sliding": dataclasses.replace(
        _FULL,
        module=lambda model: _module(model, model.attention.window),
        operations=lambda model, length: _operations(model, _seen(length, model.attention.window)),
        label=lambda model: "Sliding-window Transformer",
        styles={"Sliding-window Transformer": Style("#332288", (0, (8, 1, 2, 1)), "<")},
        memory=lambda model, length: _memory(model, _seen(length, model.attention.window)),
    ),
}
