"""Apply a SwiGLU feed-forward layer: [B, T, D] to [B, T, D]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers.linear import Projection


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)``, no biases."""

    width: int
    dtype: jnp.dtype
    init_stddev: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def projection(features, axes, name):
            return Projection(features, axes, self.dtype, self.init_stddev, name=name)

        gate = projection(self.width, ("embed", "mlp"), "gate")(x)
        up = projection(self.width, ("embed", "mlp"), "up")(x)
        return projection(x.shape[-1], ("mlp", "embed"), "down")(gated(gate, up))


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return ``silu(gate) * up`` in float32, whatever the dtype of the arguments.

    The backward pass keeps only the arguments, in their dtype, and computes the rest again. Autodiff keeps five arrays
    of this size in float32, which is most of what a layer keeps.
    """
    return nn.silu(gate.astype(jnp.float32)) * up


def _gated_forward(gate, up):
    return gated(gate, up), (gate, up)


def _gated_backward(saved, g):
    gate, up = saved
    x = gate.astype(jnp.float32)
    sigmoid = nn.sigmoid(x)
    d_gate = g * up * sigmoid * (1 + x * (1 - sigmoid))
    return d_gate.astype(gate.dtype), (g * x * sigmoid).astype(up.dtype)


gated.defvjp(_gated_forward, _gated_backward)
