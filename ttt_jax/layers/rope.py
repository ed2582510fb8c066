"""Rotary position embedding on interleaved pairs (2j, 2j + 1).

Shapes: B batch, T tokens, H heads, d head width.
"""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Turns pair j of token t by the angle ``positions[t] * theta^(-2j/d)``.

    Angles, sines and the rotation are float32 whatever the dtype of x: rounded to bfloat16, angles are wrong by 2
    radians at position 2048.

    Args:
      x: [B, T, H, d], d even.
      positions: [T], integers.
    """
    d = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)  # [d / 2]
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies  # [T, 1, d / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], d // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
