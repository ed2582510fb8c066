"""Normalise the inputs of blocks and the outputs of mixers: [..., D] to [..., D]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers.linear import named, parameter


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale``; statistics in float32, cast to ``dtype`` before the scale."""

    dtype: jnp.dtype
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", nn.initializers.ones, (x.shape[-1],), ("channels",))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def post_norm() -> nn.LayerNorm:
    """Return the LayerNorm over the full width of the output of recurrent mixers, in float32."""
    return nn.LayerNorm(
        epsilon=1e-6,
        dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=named(nn.initializers.ones, ("channels",)),
        bias_init=named(nn.initializers.zeros, ("channels",)),
        name="post_norm",
    )
