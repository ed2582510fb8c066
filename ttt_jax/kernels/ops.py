"""Define the operations that kernels are made of, with derivatives that suit a TPU.

Matrix products round their operands to one dtype, forward and backward, and accumulate in float32. Inside a kernel a
rule of differentiation may not close over arrays, so each rule makes its masks itself.

GELU in its tanh form and its first two derivatives share one tanh. With a = sqrt(2 / pi), c = 0.044715,
w = a (z + c z^3), h = (1 + tanh w) / 2, which is the logistic function of 2 w, and y = (2 w)' = 2 a + 6 a c z^2,

    gelu = z h          gelu' = h + z h (1 - h) y          gelu'' = h (1 - h) (2 y + z (1 - 2 h) y^2 + z y')

The LN of the learner and the gradient of the loss through it are written out; :mod:`ttt_jax.ttt.learners` has LN in
plain form, and :mod:`ttt_jax.ttt.dual` gets the gradient by autodiff. With x = (z - mean z) r,
r = 1 / sqrt(var z + epsilon), and the symmetric map P y = y - mean(y) - x mean(x y),

    LN backwards            dz = r P dx
    gradient of the loss    G = r P g                                   g = s^2 x + h,  h = s (bias - target)
    and backwards           dz = r P w - r^2 x mean(dG P g)             w = r (s^2 P dG - mean(g x) dG - g mean(x dG))
                            dh = r P dG,   d(s^2) = x dh

for the scale s of LN. A reduction over lanes takes a hundred cycles, and two that depend on each other take two
hundred. So in the backward formulas, where all but dG is known beforehand, every mean is of a product with dG itself.

The mean of z is almost zero: the weights of the kernels start with a zero mean over the output features, and P removes
it from all their steps. It is subtracted all the same, because otherwise rounding errors amplify themselves and grow
with the sequence.

Shapes: s heads of the pack; rows are tokens; 128 lanes are the features of a pack. Means are over the features of
a head.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.kernels.layout import LANES, Layout
from ttt_jax.ttt.learners import LAYER_NORM_EPSILON


class Numerics(NamedTuple):
    """The layout of a kernel, and the dtype that operands of matrix products are rounded to."""

    layout: Layout
    operands: jnp.dtype


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a: jax.Array, b: jax.Array, how: str, operands: jnp.dtype) -> jax.Array:
    """Return ``a b``, ``a b^T`` or ``a^T b`` for ``how`` nn, nt or tn, in float32."""
    return _dot(a.astype(operands), b.astype(operands), how)


def _dot(a, b, how):
    if how == "tn":
        a = a.T  # as an operation of its own, it can be scheduled long before b is known
    contracted = ((1,), (1,)) if how == "nt" else ((1,), (0,))
    return lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _dot_forward(a, b, how, operands):
    a, b = a.astype(operands), b.astype(operands)
    return _dot(a, b, how), (a, b)


def _dot_backward(how, operands, saved, g):
    (a, b), g = saved, g.astype(operands)
    if how == "nn":
        return _dot(g, b, "nt"), _dot(a, g, "tn")
    if how == "nt":
        return _dot(g, b, "nn"), _dot(g, a, "tn")
    return _dot(b, g, "nt"), _dot(a, g, "nn")


dot.defvjp(_dot_forward, _dot_backward)


def lanes_of_head(layout: Layout, head: int) -> jax.Array:
    """Return whether each lane is a feature of a head of the pack, [1, 128]."""
    return _is_of_head(layout, head, (1, LANES), 1)


def _is_of_head(layout, head, shape, axis):
    index, first = lax.broadcasted_iota(jnp.int32, shape, axis), head * layout.slot
    return (index >= first) & (index < first + layout.head_dim)


def _over_heads(layout, per_head):
    """Return ``per_head(mask, head)`` in the lanes of each head, 0 elsewhere."""
    full = layout.pack * layout.head_dim == LANES  # no lane is empty: those of the last head are all others
    out: Any = per_head(lanes_of_head(layout, layout.pack - 1), layout.pack - 1) if full else 0.0
    for head in range(layout.pack - full):
        mask = lanes_of_head(layout, head)
        out = jnp.where(mask, per_head(mask, head), out)
    return out


def head_mean(xs: Sequence[jax.Array], numerics: Numerics, by_lanes: bool = False) -> list[jax.Array]:
    """Return means over the features of each head of arrays [rows, 128], in all lanes of the head."""
    return [x * (1 / numerics.layout.head_dim) for x in head_sum(xs, numerics, by_lanes)]


def head_sum(xs: Sequence[jax.Array], numerics: Numerics, by_lanes: bool = False) -> list[jax.Array]:
    """Return sums over the features of each head of arrays [rows, 128], in all lanes of the head.

    The matrix units take many rows at once, and round them like all operands; with ``by_lanes`` nothing is rounded.
    """
    layout, operands = numerics
    if by_lanes or operands == jnp.float32:
        return [_sum_over_lanes(x, layout) for x in xs]
    sums = _dot(jnp.concatenate(xs, 0).astype(operands), _ones_per_head(layout).astype(operands), "nn")
    ends = list(itertools.accumulate(x.shape[0] for x in xs))
    return [sums[end - x.shape[0] : end] for x, end in zip(xs, ends, strict=True)]


def _sum_over_lanes(x, layout):
    if layout.head_dim == LANES:
        return jnp.broadcast_to(jnp.sum(x, -1, keepdims=True), x.shape)
    return _over_heads(layout, lambda mask, head: jnp.sum(jnp.where(mask, x, 0.0), -1, keepdims=True))


def _ones_per_head(layout):
    """Return [128, 128] with 1 where row and column are features of the same head, else 0."""
    rows, lanes = ([_is_of_head(layout, head, (LANES, LANES), axis) for head in range(layout.pack)] for axis in (0, 1))
    same = [row & lane for row, lane in zip(rows, lanes, strict=True)]
    return jnp.where(reduce(jnp.logical_or, same), 1.0, 0.0)


def spread(rates: jax.Array, layout: Layout) -> jax.Array:
    """Repeat a number per head in all lanes of the head, [rows, s] to [rows, 128]."""
    return _over_heads(layout, lambda mask, head: jnp.broadcast_to(rates[:, head : head + 1], (rates.shape[0], LANES)))


def unspread(x: jax.Array, layout: Layout) -> jax.Array:
    """Apply the transpose of :func:`spread`: sum over the lanes of each head, [rows, 128] to [rows, s]."""
    masked = [jnp.where(lanes_of_head(layout, head), x, 0.0) for head in range(layout.pack)]
    return jnp.concatenate([jnp.sum(x, -1, keepdims=True) for x in masked], 1)


def inverse_root(variance: jax.Array) -> jax.Array:
    """Return ``1 / sqrt(variance + epsilon)``."""
    return lax.rsqrt(variance + LAYER_NORM_EPSILON)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def split(x: jax.Array, parts: int) -> tuple[jax.Array, ...]:
    """Split rows into equal parts; the derivative concatenates the gradients of the parts instead of adding them up."""
    rows = x.shape[0] // parts
    return tuple(x[i * rows : (i + 1) * rows] for i in range(parts))


split.defvjp(lambda x, parts: (split(x, parts), None), lambda parts, _, g: (jnp.concatenate(g, 0),))


def stack_heads(layout: Layout, x: jax.Array) -> jax.Array:
    """Repeat rows for each head, with zeros in the lanes of the other heads, [rows, 128] to [s * rows, 128]."""
    if layout.pack == 1:
        return x
    return jnp.concatenate([jnp.where(lanes_of_head(layout, head), x, 0.0) for head in range(layout.pack)], 0)


def unstack_heads(layout: Layout, x: jax.Array) -> jax.Array:
    """Apply the transpose of :func:`stack_heads`: take the lanes of each head from its rows, to [rows, 128]."""
    if layout.pack == 1:
        return x
    parts = split(x, layout.pack)
    return _over_heads(layout, lambda mask, head: parts[head])


_A = math.sqrt(2 / math.pi)
_AC = _A * 0.044715


def gelu(z: jax.Array) -> jax.Array:
    """Return GELU."""
    return z * _half_of_one_and_tanh(z, z * z)


def gelu_and_derivative(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return GELU and its derivative."""
    square = z * z
    h = _half_of_one_and_tanh(z, square)
    value = z * h
    return value, h + value * (1 - h) * (2 * _A + 6 * _AC * square)


def gelu_and_derivatives(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return GELU and its first and second derivative."""
    square = z * z
    h = _half_of_one_and_tanh(z, square)
    value = z * h
    y = 2 * _A + 6 * _AC * square
    slope = h * (1 - h)
    zy = z * y
    second = slope * (y * (2 + (1 - 2 * h) * zy) + 12 * _AC * square)
    return value, h + slope * zy, second


def _half_of_one_and_tanh(z, square):
    return 0.5 * jnp.tanh(z * (_A + _AC * square)) + 0.5


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalise(z: jax.Array, numerics: Numerics) -> jax.Array:
    """Return x."""
    return normalise_with_root(z, numerics)[0]


def normalise_with_root(z: jax.Array, numerics: Numerics) -> tuple[jax.Array, jax.Array]:
    """Return x and r."""
    mean, square = head_mean((z, z * z), numerics)
    r = inverse_root(square - mean * mean)
    return (z - mean) * r, r


def normalise_backward(dx: jax.Array, x: jax.Array, r: jax.Array, numerics: Numerics) -> jax.Array:
    """Return dz of LN."""
    mean, product = head_mean((dx, dx * x), numerics)
    return r * (dx - mean - x * product)


def _normalise_forward(z, numerics):
    x, r = normalise_with_root(z, numerics)
    return x, (x, r)


def _normalise_backward(numerics, saved, dx):
    x, r = saved
    return (normalise_backward(dx, x, r, numerics),)


normalise.defvjp(_normalise_forward, _normalise_backward)


class LossGradient(NamedTuple):
    """G and the arrays that it is computed from, [rows, 128] each."""

    value: jax.Array
    x: jax.Array
    r: jax.Array
    g: jax.Array
    gx: jax.Array  # mean(g x)


def loss_gradient(z: jax.Array, s2: jax.Array, h: jax.Array, numerics: Numerics) -> LossGradient:
    """Return G from z [rows, 128], s^2 [1, 128] and h [rows, 128]."""
    x, r = normalise_with_root(z, numerics)
    g = s2 * x + h
    mean, gx = head_mean((g, g * x), numerics)
    return LossGradient(r * (g - mean - x * gx), x, r, g, gx)


def means_for_chain(s2: jax.Array, h: jax.Array, numerics: Numerics) -> tuple[jax.Array, jax.Array]:
    """Return the means of s^2 [1, 128] and h [rows, 128]."""
    mean_s2, mean_h = head_mean((jnp.broadcast_to(s2, (8, s2.shape[1])), h), numerics)
    return mean_s2[:1], mean_h


def loss_gradient_in_chain(
    z: jax.Array,
    s2: jax.Array,
    h: jax.Array,
    mean_s2: jax.Array,
    mean_h: jax.Array,
    numerics: Numerics,
    by_lanes: bool = True,
) -> jax.Array:
    """Return G like :func:`loss_gradient`, but sooner: no mean depends on another.

    The means of z and z^2 must be exact and are taken over lanes; those with s^2 and h are taken over lanes or by the
    matrix units.
    """
    part = 1 / numerics.layout.head_dim  # sums of parts are means
    zd, s2d = z * part, (s2 * part) * z
    mean, square = head_sum((zd, zd * z), numerics, by_lanes=True)
    s2_z, s2_zz, hz = head_sum((s2d, s2d * z, (h * part) * z), numerics, by_lanes)
    r = inverse_root(square - mean * mean)
    x = (z - mean) * r
    s2_x = r * (s2_z - mean * mean_s2)
    s2_xx = r * r * (s2_zz - mean * (s2_z + s2_z - mean * mean_s2))
    hx = r * (hz - mean * mean_h)
    return r * (s2 * x + h - (s2_x + mean_h) - x * (s2_xx + hx))


class Means(NamedTuple):
    """The means that do not depend on dG, [rows, 128] each."""

    s2: jax.Array
    s2_x: jax.Array
    s2_xx: jax.Array
    g: jax.Array


def means_for_backward(at: LossGradient, s2: jax.Array, numerics: Numerics) -> Means:
    """Return the means for :func:`loss_gradient_backward`."""
    s2_x = s2 * at.x
    s2 = jnp.broadcast_to(s2, at.x.shape)
    return Means(*head_mean((s2, s2_x, s2_x * at.x, at.g), numerics))


def loss_gradient_backward(
    u: jax.Array, at: LossGradient, means: Means, s2: jax.Array, numerics: Numerics
) -> tuple[jax.Array, jax.Array]:
    """Return dz and dh from u = dG; d(s^2) is the sum over rows of x dh."""
    x, r, g = at.x, at.r, at.g
    u_, xu, gu, su, sxu = head_mean((u, x * u, at.value * u, s2 * u, s2 * x * u), numerics, by_lanes=True)
    p_u = u - u_ - x * xu
    w = s2 * p_u - at.gx * u - g * xu
    w_ = su - u_ * (means.s2 + at.gx) - xu * (means.s2_x + means.g)
    xw = sxu - u_ * means.s2_x - xu * (means.s2_xx + at.gx + at.gx)
    return r * r * (w - w_ - x * xw) - r * x * gu, r * p_u
