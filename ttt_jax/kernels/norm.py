"""Compute the LN of the learner, the gradient of the loss through it, and their derivatives, for one pack.

:mod:`ttt_jax.ttt.learners` has LN in plain form, and :mod:`ttt_jax.ttt.dual` gets the gradient by autodiff.

With x = (z - mean z) r, r = 1 / sqrt(var z + epsilon), and the symmetric map P y = y - mean(y) - x mean(x y),

    LN backwards            dz = r P dx
    gradient of the loss    G = r P g                                   g = s^2 x + h,  h = s (bias - target)
    and backwards           dz = r P w - r^2 x mean(dG P g)             w = r (s^2 P dG - mean(g x) dG - g mean(x dG))
                            dh = r P dG,   d(s^2) = x dh

for the scale s of LN. A reduction over lanes takes a hundred cycles, and two that depend on each other take two
hundred. So in the backward formulas, where all but dG is known beforehand, every mean is of a product with dG itself.

The mean of z is almost zero: the weights of the kernels start with a zero mean over the output features, and P removes
it from all their steps. It is subtracted all the same, because otherwise rounding errors amplify themselves and grow
with the sequence.

Shapes: rows are tokens, 128 lanes are the features of a pack. Means are over the features of a head.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_jax.kernels.ops import Numerics, head_mean, head_sum, inverse_root


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
