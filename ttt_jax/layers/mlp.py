"""SwiGLU feed-forward layer. [B, T, D] to [B, T, D]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers.projection import Projection


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)``, no biases."""

    width: int
    dtype: jnp.dtype
    init_stddev: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def projection(features, axes, name):
            return Projection(features, axes, self.dtype, self.init_stddev, name=name)

        gate = projection(self.width, ("embed", "mlp"), "gate")(x).astype(jnp.float32)
        hidden = nn.silu(gate) * projection(self.width, ("embed", "mlp"), "up")(x)
        return projection(x.shape[-1], ("mlp", "embed"), "down")(hidden)
