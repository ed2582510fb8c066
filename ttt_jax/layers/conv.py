"""Causal depthwise convolution over time. [B, T, D] to [B, T, D]."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ttt_jax.layers.parameter import parameter

STATE_AXES = PartitionSpec("batch", None, None)


class CausalConv(nn.Module):
    """``y[t] = sum_j kernel[j] * x[t - width + 1 + j] + bias`` per channel, zeros before the first token."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, state: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Convolves x. ``state`` holds the last ``width - 1`` inputs, [B, width - 1, D]; None starts from zeros."""
        batch, tokens, channels = x.shape
        kernel = parameter(self, "kernel", _lecun_normal, (self.width, channels), (None, "channels"))
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,), ("channels",))

        before = jnp.zeros((batch, self.width - 1, channels), x.dtype) if state is None else state.astype(x.dtype)
        x = jnp.concatenate([before, x], axis=1).astype(self.dtype)
        y = (convolve(x, kernel) + bias).astype(self.dtype)
        return y, None if state is None else x[:, tokens:]


def initial_state(batch: int, width: int, channels: int, dtype: jnp.dtype) -> jax.Array:
    """The state of a :class:`CausalConv` before the first token, [B, width - 1, D]."""
    return jnp.zeros((batch, width - 1, channels), dtype)


def _lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Truncated normal of variance 1 / fan_in; the fan-in of a depthwise kernel [width, D] is its width."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")(
        key, (shape[0], 1, shape[1]), dtype
    ).reshape(shape)


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``y[t] = sum_j kernel[j] * x[t + j]``, [B, T + width - 1, D] and [width, D] to [B, T, D] float32.

    A sum of shifted products, forward and backward: for a width of 4 much cheaper than a grouped convolution. The
    backward pass is written out because autodiff makes it a sum of padded arrays, each of which is materialised: ten
    times slower on a CPU.
    """
    width = len(kernel)
    tokens = x.shape[1] - width + 1
    shifted = [kernel[j] * x[:, j : j + tokens].astype(jnp.float32) for j in range(width)]
    return functools.reduce(jnp.add, shifted)


def _convolve_forward(x, kernel):
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(saved, g):
    x, kernel = saved
    width, tokens = len(kernel), g.shape[1]
    padded = jnp.pad(g, ((0, 0), (width - 1, width - 1), (0, 0)))
    x_gradient = convolve(padded, kernel[::-1])
    kernel_gradient = jnp.stack([(x[:, j : j + tokens] * g).sum((0, 1)) for j in range(width)])
    return x_gradient.astype(x.dtype), kernel_gradient


convolve.defvjp(_convolve_forward, _convolve_backward)
