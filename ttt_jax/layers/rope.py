"""Rotate features by their position (RoPE), in interleaved pairs (2j, 2j + 1).

Shapes: B batch, T tokens, H heads, d head width.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Rotate pair j of token t by the angle ``positions[t] * theta^(-2j/d)``.

    Angles, sines and the rotation are float32 whatever the dtype of x: rounded to bfloat16, angles are wrong by 2
    radians at position 2048.

    Args:
      x: [B, T, H, d], d even.
      positions: [T], or [B, T] where rows differ; integers.
    """
    d = x.shape[-1]
    is_even = jnp.arange(d) % 2 == 0
    frequencies = jnp.repeat(theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d), 2)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [T, 1, d] or [B, T, 1, d]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # With the pairs on an axis of their own, a TPU lays out tokens along lanes, which slows the operations around this.
    partner = jnp.where(is_even, _shifted(x, -1), _shifted(x, 1)).astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + partner * jnp.where(is_even, -sin, sin)).astype(x.dtype)


def _rotate_forward(x, positions, theta):
    return rotate(x, positions, theta), positions


def _rotate_backward(theta, positions, g):
    return rotate(g, -positions, theta), None


def _shifted(x, by):
    """Shift features by one place and fill with zero; unlike ``jnp.roll``, this is fused into what uses it."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * (x.ndim - 1), (by, -by, 0)])


rotate.defvjp(_rotate_forward, _rotate_backward)
