"""Rotate features by their position (RoPE), in pairs.

The pairs are ``interleaved``, (2j, 2j + 1), as in the paper's code, or ``half_split``, (j, j + d/2), as in the released
weights of Llama. The two are the same up to the order of the features.

Shapes: B batch, T tokens, H heads, d head width.
"""

from functools import partial

import jax
import jax.numpy as jnp

PAIRS = ("interleaved", "half_split")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotate(x: jax.Array, positions: jax.Array, theta: float = 10000.0, pairs: str = "interleaved") -> jax.Array:
    """Rotate pair j of token t by the angle ``positions[t] * theta^(-2j/d)``.

    Angles, sines and the rotation are float32 whatever the dtype of x: rounded to bfloat16, angles are wrong by 2
    radians at position 2048.

    Args:
      x: [B, T, H, d], d even.
      positions: [T], or [B, T] where rows differ; integers.
      pairs: which features are rotated together, of :data:`PAIRS`.
    """
    d = x.shape[-1]
    frequencies = theta ** (-jnp.arange(0, d, 2, dtype=jnp.float32) / d)  # [d / 2]
    if pairs == "interleaved":
        by, is_first, frequencies = 1, jnp.arange(d) % 2 == 0, jnp.repeat(frequencies, 2)
    else:
        by, is_first, frequencies = d // 2, jnp.arange(d) < d // 2, jnp.tile(frequencies, 2)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [T, 1, d] or [B, T, 1, d]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # With the pairs on an axis of their own, a TPU lays out tokens along lanes, which slows the operations around this.
    partner = jnp.where(is_first, _shifted(x, -by), _shifted(x, by)).astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + partner * jnp.where(is_first, -sin, sin)).astype(x.dtype)


def _rotate_forward(x, positions, theta, pairs):
    return rotate(x, positions, theta, pairs), positions


def _rotate_backward(theta, pairs, positions, g):
    return rotate(g, -positions, theta, pairs), None


def _shifted(x, by):
    """Shift features by some places and fill with zero; unlike ``jnp.roll``, this is fused into what uses it."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * (x.ndim - 1), (by, -by, 0)])


rotate.defvjp(_rotate_forward, _rotate_backward)
