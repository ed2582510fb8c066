"""Rotary position embedding on interleaved pairs (2j, 2j + 1).

Shapes: B batch, T tokens, H heads, d head width.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Turns pair j of token t by the angle ``positions[t] * theta^(-2j/d)``.

    Angles, sines and the rotation are float32 whatever the dtype of x: rounded to bfloat16, angles are wrong by 2
    radians at position 2048.

    Args:
      x: [B, T, H, d], d even.
      positions: [T], integers.
    """
    d = x.shape[-1]
    is_even = jnp.arange(d) % 2 == 0
    frequencies = jnp.repeat(theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d), 2)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies  # [T, 1, d]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x32 = x.astype(jnp.float32)
    # With the pairs on an axis of their own, a TPU lays out tokens along lanes, and what is around pays for it.
    partner = jnp.where(is_even, jnp.roll(x32, -1, -1), jnp.roll(x32, 1, -1))
    return (x32 * cos + partner * jnp.where(is_even, -sin, sin)).astype(x.dtype)


def _rotate_forward(x, positions, theta):
    return rotate(x, positions, theta), positions


def _rotate_backward(theta, positions, g):
    return rotate(g, -positions, theta), None


rotate.defvjp(_rotate_forward, _rotate_backward)
