"""Compute one group of mini-batches of TTT-Linear, for one pack of heads: the dual form on two levels.

With W and c at the start of the group, the outputs of the tokens of the group, for keys and for queries, are

    Z = K W + c - (C_k * (K K^T + 1)) S          Zbar = Q W + c - (C_q * (Q K^T + 1)) S          S = eta * G

where G are the gradients of the losses at Z, and C are the factors of each step for each token (see
:class:`ttt_jax.kernels.layout.Coefficients`). The next group starts with the weights W - K^T (C_end * S).

What is left of the recurrence inside a group is the *chain*: G of a mini-batch depends on G of those before it. With
Z0 = K W + c and E = C_k * (K K^T + 1), for the mini-batches t of a group,

    Z_t = Z0_t - E_t S_(<t)          S_t = eta_t * G(Z_t)

and backwards there is a chain in the other direction, from the gradients dS that come from elsewhere:

    dS_t += -(E_(>t))^T dZ_(>t)      dZ_t = (dG / dZ)^T (eta_t * dS_t)          dE = -dZ S^T

The chain has little to compute and much to wait for. Everything else (G itself, once Z is known, and dE) is done for
all mini-batches of the group at once.

The weights of a pack of two heads are one matrix of 128 x 128 with a block for each head. Keys are stacked by head,
with zeros in the lanes of the other head, so that one product serves both and the blocks stay apart.

Shapes: L tokens of the group, s heads of the pack, b tokens of a mini-batch, P packs; columns of E and stacked rows
such as S are (mini-batch, head, token).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels import layout as layout_lib
from ttt_jax.kernels.forward_backward import Saved
from ttt_jax.kernels.layout import LANES, Coefficients, Layout, Norm, Tokens
from ttt_jax.kernels.ops import (
    Numerics,
    dot,
    loss_gradient,
    loss_gradient_backward,
    loss_gradient_in_chain,
    means_for_backward,
    means_for_chain,
    normalise,
    split,
    spread,
    stack_heads,
    unspread,
    unstack_heads,
)
from ttt_jax.ttt.learner import Affine, Weights

# Cycles of the scheduler's model by which each pack starts after the one before, forward and backward.
STAGGER = (0.0, 0.0)
coefficients = layout_lib.coefficients


def most_packs(widths: tuple[int, ...], operands: jnp.dtype) -> int:
    """Return the largest number of packs to compute together: as many as fit into the fast memory of the chip."""
    return 8 if operands == jnp.float32 else 16


def unroll(layout: Layout) -> tuple[int, int]:
    """Return how many groups to compute together, forward and backward: two, unless many packs fill the pauses."""
    return (2 if layout.block_packs <= 8 else 1), 2


class State(NamedTuple):
    """The weights of packs, whose mean over the output features of a head is zero."""

    weight: jax.Array  # [..., P, 128, 128]
    bias: jax.Array  # [..., P, 1, 128]


def chain(numerics: Numerics, widths: tuple[int, ...]) -> tuple[Saved, ...]:
    """Return the array of the chain that is stored: Z."""
    return (Saved(1, LANES, jnp.float32),)


def group(
    numerics: Numerics,
    state: State,
    tokens: Tokens,
    ln: Norm,
    coefficients: Coefficients,
    chain: tuple[jax.Array, ...] | None = None,
) -> tuple[State, jax.Array, tuple[jax.Array, ...]]:
    """Return the state after a group, the outputs z [L, 128], and the chain (Z [L, 128],).

    With a stored ``chain``, no mini-batch waits for another; derivatives are the same as without.
    """
    layout, operands = numerics
    q, k, v, eta = tokens
    scale2 = ln.scale * ln.scale
    shift = ln.scale * (ln.bias - (v - k))
    stacked = jnp.concatenate([stack_heads(layout, x) for x in split(k, layout.group)], 0)  # [s L, 128]
    at_start = split(dot(jnp.concatenate([k, q], 0), state.weight, "nn", operands) + state.bias, 2)
    similarity = split(dot(jnp.concatenate([k, q], 0), stacked, "nt", operands) + 1.0, 2)  # [L, s L] each
    for_keys = similarity[0] * coefficients.keys
    for_queries = similarity[1] * coefficients.queries

    z0, z0_bar = at_start
    if chain is None:
        scaled, z = solve_chain(z0, for_keys, scale2, shift, eta, numerics)
        chain = (z,)
    else:
        scaled = known_chain(z0, for_keys, scale2, shift, eta, *chain, numerics)

    z_bar = z0_bar - dot(for_queries, scaled, "nn", operands)
    out = q + normalise(z_bar, numerics) * ln.scale + ln.bias

    step = coefficients.end * scaled
    weight = state.weight - dot(stacked, step, "tn", operands)
    bias = state.bias - step.sum(0, keepdims=True)
    return State(weight, bias), out, chain


def derivative(
    numerics: Numerics,
    state: State,
    tokens: Tokens,
    ln: Norm,
    coefficients: Coefficients,
    chain: tuple[jax.Array, ...],
    d_new: State,
    d_z: jax.Array,
) -> tuple[State, Tokens, Norm, Coefficients]:
    """Return the gradients with respect to the arguments of :func:`group`, from those of the new state and of z."""
    state = State(*(x.astype(jnp.float32) for x in state))

    def known(state, tokens, ln, coefficients):
        return group(numerics, state, tokens, ln, coefficients, chain)[:2]

    _, vjp = jax.vjp(known, state, tokens, ln, coefficients)
    return vjp((d_new, d_z))


def pack(layout: Layout, weights: Weights) -> State:
    """Pack weights [B, H, ...], without their mean over the output features, which LN removes anyway."""
    weight, bias = (x - x.mean(-1, keepdims=True) for x in jax.tree.leaves(weights))
    for axis in (2, 3):
        weight = layout_lib.pack_features(layout, weight, axis)
    weight = layout_lib.pack_heads(layout, weight, 1)  # [B, P, s, slot, slot]
    apart = jnp.eye(layout.pack)[:, None, :, None]
    diagonal = weight[:, :, :, :, None, :] * apart  # [B, P, s, slot, s, slot]
    return State(diagonal.reshape(*weight.shape[:2], LANES, LANES), layout_lib.pack_features_in_lanes(layout, bias, 1))


def unpack(layout: Layout, state: State, start: Weights) -> Weights:
    """Unpack weights to [B, H, ...], with the mean that :func:`pack` removed from ``start``."""
    s, slot, d, heads = layout.pack, layout.slot, layout.head_dim, layout.heads
    batch = state.weight.shape[0]
    blocks = state.weight.reshape(batch, layout.packs, s, slot, s, slot)
    weight = jnp.stack([blocks[:, :, i, :, i] for i in range(s)], 2).reshape(batch, -1, slot, slot)[:, :heads, :d, :d]
    bias = state.bias.reshape(batch, -1, 1, slot)[:, :heads, :, :d]
    old_weight, old_bias = (x.mean(-1, keepdims=True) for x in jax.tree.leaves(start))
    return (Affine(weight + old_weight, bias + old_bias),)


def solve_chain(
    z0: jax.Array, e: jax.Array, s2: jax.Array, h: jax.Array, eta: jax.Array, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """Return S [s L, 128] and Z [L, 128], mini-batch after mini-batch; for the arguments see :func:`known_chain`."""
    layout, operands = numerics
    steps: list[jax.Array] = []
    zs: list[jax.Array] = []
    nothing = jnp.zeros((layout.pack * layout.mini_batch, LANES), jnp.float32)
    mean_s2, mean_h = means_for_chain(s2, h, numerics)
    tiles = zip(*(split(x, layout.group) for x in (z0, e, h, mean_h, eta)), strict=True)
    for t, (z, e_t, h_t, mean_h_t, eta_t) in enumerate(tiles):
        if t:
            z -= dot(e_t, jnp.concatenate(steps + [nothing] * (layout.group - t), 0), "nn", operands)
        gradient = loss_gradient_in_chain(z, s2, h_t, mean_s2, mean_h_t, numerics, by_lanes=False)
        zs.append(z)
        steps.append(stack_heads(layout, spread(eta_t, layout) * gradient))
    return jnp.concatenate(steps, 0), jnp.concatenate(zs, 0)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def known_chain(
    z0: jax.Array, e: jax.Array, s2: jax.Array, h: jax.Array, eta: jax.Array, z: jax.Array, numerics: Numerics
) -> jax.Array:
    """Return S [s L, 128] where Z [L, 128] is known from :func:`solve_chain`; this function can be differentiated.

    Args:
      z0: [L, 128].
      e: [L, s L], nonzero only for mini-batches before that of the row.
      s2, h: scale^2 and h, see :mod:`ttt_jax.kernels.ops`.
      eta: [L, s].
    """
    return _known_chain(z0, e, s2, h, eta, z, numerics)[0]


def _known_chain(z0, e, s2, h, eta, z, numerics):
    layout = numerics.layout
    at = loss_gradient(z, s2, h, numerics)
    rates = spread(eta, layout)
    steps = jnp.concatenate([stack_heads(layout, x) for x in split(rates * at.value, layout.group)], 0)
    return steps, (e, s2, rates, at, steps)


def _known_chain_backward(numerics, saved, d_steps):
    layout, operands = numerics
    e, s2, rates, at, steps = saved
    g, b = layout.group, layout.mini_batch
    e_t = split(e.astype(operands).T, g)  # [s b, L] each
    means = means_for_backward(at, s2, numerics)
    rates_t, at_t, means_t = (_tiles(x, g) for x in (rates, at, means))
    d_steps_t = split(d_steps, g)
    nothing = jnp.zeros((b, LANES), jnp.float32)
    d, dz, dh = ([nothing] * g for _ in range(3))
    for t in reversed(range(g)):
        d_t = d_steps_t[t]
        if t < g - 1:
            d_t -= dot(e_t[t], jnp.concatenate(dz, 0), "nn", operands)
        d[t] = unstack_heads(layout, d_t)
        dz[t], dh[t] = loss_gradient_backward(rates_t[t] * d[t], at_t[t], means_t[t], s2, numerics)
    d_all, dz_all, dh_all = (jnp.concatenate(x, 0) for x in (d, dz, dh))
    d_s2 = (dh_all * at.x).sum(0, keepdims=True)
    d_eta = unspread(d_all * at.value, layout)
    return dz_all, -dot(dz_all, steps, "nt", operands), d_s2, dh_all, d_eta, jnp.zeros_like(dz_all)


known_chain.defvjp(_known_chain, _known_chain_backward)


def _tiles(tree, parts):
    """Split a tree of arrays into a list of trees, one for each part of the rows."""
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, x) for x in zip(*(split(x, parts) for x in leaves), strict=True)]
