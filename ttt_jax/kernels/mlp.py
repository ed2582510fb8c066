"""Compute one group of mini-batches of TTT-MLP, for one pack of heads: the dual form on two levels.

With the weights at the start of the group, for the keys of its tokens,

    Z1 = K W1 + c1 - E1 T1        E1 = K K^T + 1        X = gelu(Z1)
    Z2 = X W2 + c2 - E2 T2        E2 = X X^T + 1        G2 = gradient of the loss at Z2
    GX = G2 W2^T - F X            F = G2 T2^T           G1 = GX * gelu'(Z1)

where S = eta * G, T = (rate of the last position) * S, and E and F are nonzero only for mini-batches before that of
the row. For the queries, with C the factor of each step for each token (see :func:`coefficients`),

    Y1 = Q W1 + c1 - (C * (Q K^T + 1)) S1        XQ = gelu(Y1)        Y2 = XQ W2 + c2 - (C * (XQ X^T + 1)) S2

The next group starts with W1 - K^T T1 and W2 - X^T T2. W2 is held transposed, so that all weights are [128, m]; its
mean over the output features of a head and that of c2 are zero. :mod:`ttt_jax.kernels.mlp_backward` has the derivative.

Shapes: L tokens of the group, s heads of the pack, b tokens of a mini-batch, m hidden features in whole registers; for
*compact*, *rows* and *pairs* see :mod:`ttt_jax.kernels.mlp_layout`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import layout as layout_lib
from ttt_jax.kernels.forward_backward import Saved
from ttt_jax.kernels.layout import LANES, Layout, Norm, Tokens
from ttt_jax.kernels.mlp_backward import derivative as derivative
from ttt_jax.kernels.mlp_layout import (
    apart,
    earlier,
    hidden_rates,
    join,
    no_tiles,
    over_hidden,
    product,
    products,
    repeat_per_token,
    stack_swapped,
    sum_per_head,
    swap,
    tile,
)
from ttt_jax.kernels.ops import (
    Numerics,
    dot,
    gelu,
    gelu_and_derivative,
    loss_gradient_in_chain,
    means_for_chain,
    normalise,
    split,
    spread,
    stack_heads,
    unstack_heads,
)
from ttt_jax.ttt.learner import Affine, Weights

# Cycles of the scheduler's model by which each pack starts after the one before, forward and backward.
STAGGER = (300.0, 1200.0)


def most_packs(widths: tuple[int, ...], operands: jnp.dtype) -> int:
    """Return the largest number of packs to compute together: as many as fit into the fast memory of the chip."""
    of_256 = 4 if operands == jnp.float32 else 8
    return max(1, min(of_256, of_256 * 256 // hidden(widths)))


def unroll(layout: Layout) -> tuple[int, int]:
    """Return how many groups to compute together, forward and backward: two, unless many packs fill the pauses."""
    best = 2 if layout.block_packs <= 6 else 1
    return best, best


class State(NamedTuple):
    """The weights of packs; the mean of the second layer over the output features of a head is zero."""

    weight1: jax.Array  # [..., P, 128, m]
    bias1: jax.Array  # [..., P, s, m]
    weight2: jax.Array  # [..., P, 128, m], transposed
    bias2: jax.Array  # [..., P, 1, 128]


class Coefficients(NamedTuple):
    """The factor by which the step of a token has moved the weights that another token sees; columns as in pairs."""

    queries: Any  # [L, s L], of the steps of tokens in columns, for the queries of tokens in rows
    of_keys: Any  # [L, s L], its transpose, of the steps of tokens in rows; without a gradient of its own
    last: Any  # [1, 128], for later mini-batches: the last position rate, in all lanes


def coefficients(layout: Layout, position_eta: jax.Array) -> Coefficients:
    """Return the coefficients of a group from the rates [b] of the positions in a mini-batch."""
    b = layout.mini_batch
    token = jnp.arange(layout.group_tokens)
    row, column = token[:, None], token[None, :]
    same = (row // b == column // b) & (column <= row)
    last = position_eta[b - 1]
    by_position = jnp.tile(position_eta, layout.group)[:, None]
    queries = jnp.where(column // b < row // b, last, 0.0) + jnp.where(same, by_position, 0.0)
    of_keys = jax.lax.stop_gradient(queries.T)
    per_head = (1, layout.pack)
    return Coefficients(jnp.tile(queries, per_head), jnp.tile(of_keys, per_head), jnp.broadcast_to(last, (1, LANES)))


def chain(numerics: Numerics, widths: tuple[int, ...]) -> tuple[Saved, ...]:
    """Return the arrays of the chain that are stored: Z1, in rows, and Z2."""
    layout, operands = numerics
    return Saved(layout.pack, hidden(widths), operands), Saved(1, LANES, jnp.float32)


def hidden(widths: tuple[int, ...]) -> int:
    """Return m, the number of lanes of the hidden features."""
    return -(-widths[1] // LANES) * LANES


def group(
    numerics: Numerics, state: State, tokens: Tokens, ln: Norm, coefficients: Coefficients
) -> tuple[State, jax.Array, tuple[jax.Array, ...]]:
    """Return the state after a group, the outputs z [L, 128], and the chain (Z1 [s L, m], Z2 [L, 128])."""
    layout, operands = numerics
    q, k, _, _ = tokens
    last = coefficients.last
    weights = state.weight1.astype(operands), state.weight2.astype(operands)
    similarity = split(dot(jnp.concatenate([k, q], 0), stack_swapped(layout, k), "nt", operands) + 1.0, 2)
    e1 = jnp.where(earlier(layout), similarity[0], 0.0)
    s1, s2, x, kept = _chain(numerics, state, weights, tokens, ln, last, e1)

    e1_q = coefficients.queries * similarity[1]
    y1 = product(q, -e1_q, weights[0], s1, numerics) + repeat_per_token(layout, state.bias1)
    y2, e2_q = products(gelu(y1), weights[1], x, numerics)
    y2 += state.bias2 - dot(coefficients.queries * (e2_q + 1.0), stack_swapped(layout, s2), "nn", operands)
    out = q + normalise(y2, numerics) * ln.scale + ln.bias

    t1, t2 = over_hidden(last, s1.shape[1]) * s1, last * s2
    new = State(
        state.weight1 - dot(stack_heads(layout, k), t1, "tn", operands),
        state.bias1 - sum_per_head(layout, t1),
        state.weight2 - dot(stack_heads(layout, t2), x, "tn", operands),
        state.bias2 - t2.sum(0, keepdims=True),
    )
    return new, out, kept


def _chain(numerics, state, weights, tokens, ln, last, e1):
    """Return S1 in rows, S2 compact, X in rows, and (Z1, Z2), computed mini-batch after mini-batch."""
    layout, operands = numerics
    (w1, w2), (_, k, v, eta) = weights, tokens
    b, m = layout.mini_batch, w1.shape[1]
    scale2, shift = ln.scale * ln.scale, ln.scale * (ln.bias - (v - k))
    means = means_for_chain(scale2, shift, numerics)
    z1_start = dot(stack_heads(layout, k), w1, "nn", operands) + repeat_per_token(layout, state.bias1)
    rates, rates1 = spread(eta, layout), hidden_rates(layout, eta, m)
    z1s, z2s, xs, s1s, t1s, s2s = (no_tiles(layout) for _ in range(6))
    for t in range(layout.group):
        now = slice(t * b, (t + 1) * b)
        z1 = tile(layout, z1_start, t)
        if t:
            z1 -= dot(apart(layout, e1[now]), swap(layout, join(layout, t1s)), "nn", operands)
        x, slope = gelu_and_derivative(z1)
        if t:
            before, t2 = join(layout, xs), stack_swapped(layout, last * _compact(layout, s2s))
            z2, e2 = products(x, w2, before, numerics)
            z2 -= dot(e2 + 1.0, t2, "nn", operands)
        else:
            z2 = unstack_heads(layout, dot(x, w2, "nt", operands))
        z2 += state.bias2
        g2 = loss_gradient_in_chain(z2, scale2, shift[now], means[0], means[1][now], numerics)
        if t:
            gx = product(g2, -dot(g2, t2, "nt", operands), w2, before, numerics)
        else:
            gx = dot(stack_heads(layout, g2), w2, "nn", operands)
        s1s[t], s2s[t] = tile(layout, rates1, t) * (gx * slope), rates[now] * g2
        xs[t], t1s[t] = x.astype(operands), (over_hidden(last, m) * s1s[t]).astype(operands)
        z1s[t], z2s[t] = z1, z2
    z1, x, s1 = (join(layout, each) for each in (z1s, xs, s1s))
    return s1, _compact(layout, s2s), x, (z1, _compact(layout, z2s))


def _compact(layout, tiles):
    """Join mini-batches [b, 128] to [L, 128], with zeros for None."""
    nothing = jnp.zeros((layout.mini_batch, LANES), jnp.float32)
    return jnp.concatenate([nothing if x is None else x for x in tiles], 0)


def pack(layout: Layout, weights: Weights) -> State:
    """Pack weights [B, H, ...], the second layer without its mean over the output features, which LN removes anyway."""
    first, second = weights
    w1, w2 = first.weight, jnp.swapaxes(second.weight - _mean(second.weight), -1, -2)
    w1, w2 = (_pack_hidden(layout_lib.pack_features(layout, x, 2)) for x in (w1, w2))  # [B, H, slot, m]
    c1 = layout_lib.pack_heads(layout, _pack_hidden(first.bias), 1)  # [B, P, s, 1, m]
    w1, w2 = (layout_lib.pack_heads(layout, x, 1).reshape(x.shape[0], layout.packs, LANES, -1) for x in (w1, w2))
    c2 = layout_lib.pack_features_in_lanes(layout, second.bias - _mean(second.bias), 1)
    return State(w1, c1[:, :, :, 0], w2, c2)


def unpack(layout: Layout, state: State, start: Weights) -> Weights:
    """Unpack weights to [B, H, ...], with the mean that :func:`pack` removed from ``start``."""
    first, second = start
    batch, width = state.weight1.shape[0], first.weight.shape[-1]
    heads, d = layout.heads, layout.head_dim

    def unpack_weight(x):
        return x.reshape(batch, layout.packs * layout.pack, layout.slot, -1)[:, :heads, :d, :width]

    c1 = state.bias1.reshape(batch, layout.packs * layout.pack, 1, -1)[:, :heads, :, :width]
    c2 = state.bias2.reshape(batch, layout.packs * layout.pack, 1, layout.slot)[:, :heads, :, :d]
    w2 = jnp.swapaxes(unpack_weight(state.weight2), -1, -2)
    return (
        Affine(unpack_weight(state.weight1), c1),
        Affine(w2 + _mean(second.weight), c2 + _mean(second.bias)),
    )


def _mean(x: Any) -> Any:
    return x.mean(-1, keepdims=True)


def _pack_hidden(x):
    missing = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, missing if i == x.ndim - 1 else 0) for i in range(x.ndim)]) if missing else x
