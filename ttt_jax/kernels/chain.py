"""What is left of the recurrence inside a group: mini-batches that wait for each other.

    Z_t = Z0_t - E_t S_(<t)          S_t = eta_t * G(Z_t)

for the mini-batches t of a group, where E_t S_(<t) is what the steps of the mini-batches before t have changed.
Backwards it is a chain in the other direction, from the dS that come from elsewhere:

    dS_t += -(E_(>t))^T dZ_(>t)      dZ_t = (dG / dZ)^T (eta_t * dS_t)          dE = -dZ S^T

The chain is short of work and long of waiting. Everything else (G itself, once Z is known; dE) is done for all
mini-batches of the group at once.

Shapes: L tokens of the group, s heads of the pack, b tokens of a mini-batch; rows of S and columns of E are
(mini-batch, head, token).
"""

from functools import partial

import jax
import jax.numpy as jnp

from ttt_jax.kernels import norm
from ttt_jax.kernels.layout import LANES
from ttt_jax.kernels.ops import Numerics, dot, split, spread, stack_heads, unspread, unstack_heads


def forward(
    z0: jax.Array, e: jax.Array, s2: jax.Array, h: jax.Array, eta: jax.Array, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """S [s L, 128], and Z [L, 128]. By the arguments of :func:`known`."""
    layout, operands = numerics
    steps: list[jax.Array] = []
    zs: list[jax.Array] = []
    nothing = jnp.zeros((layout.pack * layout.mini_batch, LANES), jnp.float32)
    mean_s2, mean_h = norm.means_for_chain(s2, h, numerics)
    tiles = zip(*(split(x, layout.group) for x in (z0, e, h, mean_h, eta)), strict=True)
    for t, (z, e_t, h_t, mean_h_t, eta_t) in enumerate(tiles):
        if t:
            z -= dot(e_t, jnp.concatenate(steps + [nothing] * (layout.group - t), 0), "nn", operands)
        gradient = norm.loss_gradient_in_chain(z, s2, h_t, mean_s2, mean_h_t, numerics, by_lanes=False)
        zs.append(z)
        steps.append(stack_heads(layout, spread(eta_t, layout) * gradient))
    return jnp.concatenate(steps, 0), jnp.concatenate(zs, 0)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def known(
    z0: jax.Array, e: jax.Array, s2: jax.Array, h: jax.Array, eta: jax.Array, z: jax.Array, numerics: Numerics
) -> jax.Array:
    """S [s L, 128], where Z [L, 128] is known from :func:`forward`; it can be differentiated.

    Args:
      z0: [L, 128].
      e: [L, s L], zero but for mini-batches before that of the row.
      s2, h: of :mod:`ttt_jax.kernels.norm`.
      eta: [L, s].
    """
    return _known(z0, e, s2, h, eta, z, numerics)[0]


def _known(z0, e, s2, h, eta, z, numerics):
    layout = numerics.layout
    at = norm.loss_gradient(z, s2, h, numerics)
    rates = spread(eta, layout)
    steps = jnp.concatenate([stack_heads(layout, x) for x in split(rates * at.value, layout.group)], 0)
    return steps, (e, s2, rates, at, steps)


def _known_backward(numerics, saved, d_steps):
    layout, operands = numerics
    e, s2, rates, at, steps = saved
    g, b = layout.group, layout.mini_batch
    e_t = split(e.astype(operands).T, g)  # [s b, L] each
    means = norm.means_for_backward(at, s2, numerics)
    rates_t, at_t, means_t = (_tiles(x, g) for x in (rates, at, means))
    d_steps_t = split(d_steps, g)
    nothing = jnp.zeros((b, LANES), jnp.float32)
    d, dz, dh = ([nothing] * g for _ in range(3))
    for t in reversed(range(g)):
        d_t = d_steps_t[t]
        if t < g - 1:
            d_t -= dot(e_t[t], jnp.concatenate(dz, 0), "nn", operands)
        d[t] = unstack_heads(layout, d_t)
        dz[t], dh[t] = norm.loss_gradient_backward(rates_t[t] * d[t], at_t[t], means_t[t], s2, numerics)
    d_all, dz_all, dh_all = (jnp.concatenate(x, 0) for x in (d, dz, dh))
    d_s2 = (dh_all * at.x).sum(0, keepdims=True)
    d_eta = unspread(d_all * at.value, layout)
    return dz_all, -dot(dz_all, steps, "nt", operands), d_s2, dh_all, d_eta, jnp.zeros_like(dz_all)


known.defvjp(_known, _known_backward)


def _tiles(tree, parts):
    """A tree of arrays as a list of trees, one for each part of the rows."""
    leaves, structure = jax.tree.flatten(tree)
    return [jax.tree.unflatten(structure, x) for x in zip(*(split(x, parts) for x in leaves), strict=True)]
