"""Differentiate a group of TTT-MLP, with the names of :mod:`ttt_jax.kernels.mlp`; dA is the gradient with respect to A.

Z1 and Z2 are known, so the forward pass of all mini-batches is computed from them at once. What is left of the
recurrence is a chain from the last mini-batch of the group to the first,

    dS1 += - E1^T dZ1                                      of later mini-batches
    dGX = eta dS1 * gelu'(Z1)          dF = - dGX X^T
    dT2 += dF^T G2 - E2^T dZ2                              of later mini-batches
    dG2 = dGX W2 + dF T2 + eta dT2     dZ2 = (dG2 / dZ2)^T dG2          dE2 = - dZ2 T2^T
    dX += dZ2 W2^T + dE2 X + dE2^T X - F^T dGX             the last two of later mini-batches
    dZ1 = dX * gelu'(Z1) + dGX / gelu'(Z1) * GX * gelu''(Z1)

where dT also gives dS, times the rate of the last position. The gradients of the weights and of K, and all that comes
from the queries, are computed for the whole group before or after the chain.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.kernels.layout import LANES, Norm, Tokens
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
    transposed_product,
    unstack_swapped,
)
from ttt_jax.kernels.ops import (
    Numerics,
    dot,
    gelu_and_derivative,
    gelu_and_derivatives,
    loss_gradient,
    loss_gradient_backward,
    means_for_backward,
    normalise_backward,
    normalise_with_root,
    spread,
    stack_heads,
    unspread,
    unstack_heads,
)


def derivative(
    numerics: Numerics,
    state: Any,
    tokens: Tokens,
    ln: Norm,
    coefficients: Any,
    chain: tuple[jax.Array, ...],
    d_new: Any,
    d_out: jax.Array,
) -> tuple[Any, Tokens, Norm, Any]:
    """Return the gradients with respect to state, tokens, LN and coefficients, from those of the new state and outputs.

    Weights of the state and Z1 may be in the dtype of operands. The gradient of ``coefficients.of_keys`` is zero,
    because that of ``coefficients.queries`` is for both.
    """
    layout, operands = numerics
    b, g, m = layout.mini_batch, layout.group, state[0].shape[1]
    w1, c1, w2, c2 = state
    q, k, v, eta = tokens
    queries, of_keys, last = coefficients
    z1, z2 = chain
    d_w1, d_w2 = d_new[0].astype(operands), d_new[2].astype(operands)
    scale2, target = ln.scale * ln.scale, v - k
    shift = ln.scale * (ln.bias - target)
    rates = spread(eta, layout)
    before = earlier(layout)

    def mm(a, b, how="nn"):
        return dot(a, b, how, operands)

    def stacked(x):
        return stack_swapped(layout, x)

    # The forward pass over keys, from Z1 and Z2.
    at = loss_gradient(z2, scale2, shift, numerics)
    g2 = at.value
    s2 = rates * g2
    t2 = last * s2
    t2_stacked = stacked(t2).astype(operands)
    x, slope = gelu_and_derivative(z1.astype(jnp.float32))
    x = x.astype(operands)
    similarity = mm(jnp.concatenate([k, q], 0), stacked(k), "nt") + 1.0
    a1, a1_q = similarity[: layout.group_tokens], similarity[layout.group_tokens :]
    f = jnp.where(before, mm(g2, t2_stacked, "nt"), 0.0)
    gx = product(g2, -f, w2, x, numerics)
    s1 = hidden_rates(layout, eta, m) * (gx * slope)
    s1_sums, s1 = sum_per_head(layout, s1), s1.astype(operands)

    # The queries, forward and backward.
    y1 = product(q, -(queries * a1_q), w1, s1, numerics) + repeat_per_token(layout, c1)
    xq, slope_q = gelu_and_derivative(y1)
    xq = xq.astype(operands)
    y2, e2_q = products(xq, w2, x, numerics)
    e2_q += 1.0
    y2 += c2 - mm(queries * e2_q, stacked(s2))
    y2, root = normalise_with_root(y2, numerics)
    d_scale, d_bias = (d_out * y2).sum(0, keepdims=True), d_out.sum(0, keepdims=True)
    d_y2 = normalise_backward(d_out * ln.scale, y2, root, numerics)
    u2 = mm(d_y2, stacked(s2), "nt")
    d_xq = product(d_y2, -(queries * u2), w2, x, numerics)
    d_s2 = -unstack_swapped(layout, mm(queries * e2_q, d_y2, "tn"))
    d_y1 = d_xq * slope_q
    d_y1_sums, d_y1 = sum_per_head(layout, d_y1), d_y1.astype(operands)
    d_q, u1 = products(d_y1, w1, s1, numerics)
    d_a1_q = -(queries * u1)
    d_q += d_out + mm(d_a1_q, stacked(k))
    d_queries = -(u1 * a1_q + u2 * e2_q)

    # The gradients of the steps of keys that come from the queries and from the new weights.
    d_x = product(-t2, -(of_keys * mm(s2, stacked(d_y2), "nt")), d_w2, xq, numerics)
    by_w2, xx = products(x, d_w2, x, numerics)
    d_t2 = -by_w2 - d_new[3]
    of_queries = of_keys * (mm(k, stacked(q), "nt") + 1.0)
    d_s1 = product(-last * k, -of_queries, d_w1, d_y1, numerics) - repeat_per_token(
        layout, over_hidden(last, m) * d_new[1]
    )
    by_w1 = unstack_heads(layout, mm(s1, d_w1, "nt"))

    # The chain.
    e1 = last[:, : a1.shape[1]] * a1
    means = means_for_backward(at, scale2, numerics)
    g2_rows = _mini_batches(layout, stack_heads(layout, g2)).astype(operands)
    t2_rows = _mini_batches(layout, stack_heads(layout, t2)).astype(operands)
    x_rows = _mini_batches(layout, x)
    t2_g2 = mm(t2_rows, g2_rows, "nt")
    rows = layout.pack * b
    dz1s, dgxs, detas = (no_tiles(layout) for _ in range(3))
    nothing = jnp.zeros((b, LANES), jnp.float32)
    dz2s, dhs, dt2s = ([nothing] * g for _ in range(3))
    for t in reversed(range(g)):
        now = slice(t * b, (t + 1) * b)
        d_s1_t, d_t2_t, d_x_t = tile(layout, d_s1, t), d_t2[now], tile(layout, d_x, t)
        gx_t = tile(layout, gx, t)
        at_t, means_t = jax.tree.map(lambda y, now=now: y[now], (at, means))
        z1_t = tile(layout, z1, t).astype(jnp.float32)
        if t < g - 1:
            z1_t = _not_before(dgxs[t + 1].astype(jnp.float32), z1_t)
        _, slope_t, curve_t = gelu_and_derivatives(z1_t)
        if t < g - 1:
            later, here = slice(0, (g - 1 - t) * rows), slice((g - 1 - t) * rows, (g - t) * rows)
            d_gx = jnp.concatenate(dgxs[:t:-1], 0)
            d_z2 = jnp.concatenate([stack_heads(layout, y) for y in dz2s[:t:-1]], 0).astype(operands)
            d_s1_t -= mm(apart(layout, e1[now]), swap(layout, join(layout, dz1s)))
            d_t2_t -= unstack_heads(layout, mm(mm(x_rows[here], d_gx, "nt"), g2_rows[later]))
            d_t2_t -= mm(xx[now] + 1.0, stacked(jnp.concatenate(dz2s, 0)))
            d_x_t -= mm(mm(t2_rows[here], d_z2, "nt"), x_rows[later]) + mm(t2_g2[here, later], d_gx)
        dt2s[t] = d_t2_t
        d_g1 = tile(layout, hidden_rates(layout, eta, m), t) * d_s1_t
        detas[t] = (d_s1_t * (slope_t * gx_t)).sum(-1, keepdims=True)
        dgxs[t] = (d_g1 * slope_t).astype(operands)
        if t:
            d_g2, d_f = products(dgxs[t], w2, x, numerics)
            d_g2 -= mm(jnp.where(before[now], d_f, 0.0), t2_stacked)
        else:
            d_g2 = unstack_heads(layout, mm(dgxs[t], w2, "nt"))
        d_g2 += rates[now] * (d_s2[now] + last * d_t2_t)
        dz2s[t], dhs[t] = loss_gradient_backward(d_g2, at_t, means_t, scale2, numerics)
        if t:
            e_t = jnp.where(before[now], mm(dz2s[t], t2_stacked, "nt"), 0.0)
            d_x_t += product(dz2s[t], -e_t, w2, x, numerics)
        else:
            d_x_t += mm(stack_heads(layout, dz2s[t]), w2)
        dz1s[t] = d_x_t * slope_t + d_g1 * (gx_t * curve_t)
    d_z1, d_gx = (join(layout, y) for y in (dz1s, dgxs))
    d_z2, d_h, d_t2 = (jnp.concatenate(y, 0) for y in (dz2s, dhs, dt2s))
    d_z1_sums, d_z1 = sum_per_head(layout, d_z1), d_z1.astype(operands)

    # All other gradients.
    d_k, u1 = products(d_z1, w1, s1, numerics)
    u1 = jnp.where(before, u1, 0.0)
    d_a1 = -last[:, : u1.shape[1]] * u1
    both = mm(jnp.concatenate([d_a1, d_a1_q], 0), jnp.concatenate([k, q], 0), "tn")
    d_k += mm(d_a1, stacked(k)) + unstack_swapped(layout, both) - last * by_w1 + ln.scale * d_h
    d_start = type(state)(
        d_new[0] + transposed_product((q, k), (d_y1, d_z1), numerics),
        d_new[1] + d_y1_sums + d_z1_sums,
        d_new[2] + transposed_product((d_y2, d_z2), (xq, x), numerics) + transposed_product((g2,), (d_gx,), numerics),
        d_new[3] + (d_y2 + d_z2).sum(0, keepdims=True),
    )
    d_scale += 2 * ln.scale * (d_h * at.x).sum(0, keepdims=True) + (d_h * (ln.bias - target)).sum(0, keepdims=True)
    d_bias += ln.scale * d_h.sum(0, keepdims=True)
    d_eta = unspread((d_s2 + last * d_t2) * g2, layout) + _by_head(layout, join(layout, detas))
    d_last = (d_t2 * s2 - k * by_w1).sum(0, keepdims=True) - _in_lanes((u1 * a1).sum(0, keepdims=True))
    d_last -= _in_lanes((d_new[1] * s1_sums).sum(0, keepdims=True))
    return (
        d_start,
        Tokens(d_q, d_k, -ln.scale * d_h, d_eta),
        Norm(d_scale, d_bias),
        type(coefficients)(d_queries, jnp.zeros_like(of_keys), d_last),
    )


def _mini_batches(layout, x):
    """Sort rows by mini-batch, the last mini-batch first."""
    return jnp.concatenate([tile(layout, x, t) for t in reversed(range(layout.group))], 0)


def _not_before(y, x):
    """Return x, but not before y: what depends on x would be computed too early, and occupy registers until then."""
    return x + 0.0 * y


def _by_head(layout, x):
    """Lay the heads of rows side by side, [s L, 1] to [L, s]."""
    tokens = layout.group_tokens
    return jnp.concatenate([x[i * tokens : (i + 1) * tokens] for i in range(layout.pack)], 1)


def _in_lanes(x):
    """Fold any number of lanes to 128 with the same sum, [1, lanes] to [1, 128]."""
    if x.shape[1] < LANES:
        return jnp.concatenate([x, jnp.zeros((1, LANES - x.shape[1]), x.dtype)], 1)
    return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))
