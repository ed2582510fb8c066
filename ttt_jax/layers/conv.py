"""Convolve over time, causally and depthwise: [B, T, D] to [B, T, D].

Shapes: B batch, T tokens, D channels, w width of the kernel.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ttt_jax.layers.context import PLAIN, Context, gather_valid, pick
from ttt_jax.layers.linear import parameter

STATE_AXES = PartitionSpec("batch", None, None)


class CausalConv(nn.Module):
    """``y[t] = sum_j kernel[j] * x[t - width + 1 + j] + bias`` per channel, zeros before the first token.

    The tokens before a token are the valid tokens of its document: padding leaves no gap.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, state: jax.Array | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolve x; return y and, where a state is given, the state after x.

        Args:
          x: [B, T, D].
          state: the last ``width - 1`` inputs of the document, [B, width - 1, D], zeros where it has fewer; None starts
            from zeros.
          context: padding, and the beginnings of documents.
        """
        batch, tokens, channels = x.shape
        kernel = parameter(self, "kernel", _lecun_normal, (self.width, channels), (None, "channels"))
        bias = parameter(self, "bias", nn.initializers.zeros, (channels,), ("channels",))

        gathered, begins = None, context.reset
        if context.valid is not None:
            gathered = gather_valid(context.valid, context)
            x, begins = gathered.take(x), gathered.context.reset
        before = jnp.zeros((batch, self.width - 1, channels), x.dtype) if state is None else state.astype(x.dtype)
        x = jnp.concatenate([before, x], axis=1).astype(self.dtype)
        since = None if begins is None else _since(begins, self.width)
        y = (convolve(x, kernel, None if since is None else since[:, :tokens]) + bias).astype(self.dtype)
        if gathered is not None:
            y = gathered.back(y)
        return y, None if state is None else self._end(x, since, None if gathered is None else gathered.counts)

    def _end(self, x: jax.Array, since: jax.Array | None, count: jax.Array | None) -> jax.Array:
        """Return the state after ``count`` [B] tokens of x, or all; x begins with the state before them."""
        before = self.width - 1
        end = x[:, x.shape[1] - before :] if count is None else pick(x, count[:, None] + jnp.arange(before))
        if since is None:
            return end
        own = since[:, -1:] if count is None else pick(since, count[:, None])  # [B, 1] tokens of the last document
        return jnp.where((jnp.arange(before, 0, -1) <= own)[..., None], end, 0)


def initial_state(batch: int, width: int, channels: int, dtype: jnp.dtype) -> jax.Array:
    """Return the state of a :class:`CausalConv` before the first token, [B, width - 1, D]."""
    return jnp.zeros((batch, width - 1, channels), dtype)


def _lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Draw a truncated normal of variance 1 / fan_in; the fan-in of a depthwise kernel [width, D] is its width."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")(
        key, (shape[0], 1, shape[1]), dtype
    ).reshape(shape)


def _since(begins: jax.Array, width: int) -> jax.Array:
    """Return the number of tokens of the same document before each token and before the next piece, [B, T + 1].

    It is ``width`` or more where the document begins before the piece.
    """
    index = jnp.arange(begins.shape[1] + 1)
    first = jax.lax.cummax(jnp.where(jnp.pad(begins, ((0, 0), (0, 1))), index, -width), axis=1)
    return index - first


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array, since: jax.Array | None = None) -> jax.Array:
    """Return ``y[t] = sum_j kernel[j] * x[t + j]``, [B, T + w - 1, D] and [w, D] to [B, T, D] float32.

    With ``since`` [B, T], the sum is over inputs that are at most so many tokens before its last one, x[t + w - 1].

    It is computed as a sum of shifted products, forward and backward: for a width of 4 much cheaper than a grouped
    convolution. The backward pass is written out because autodiff makes it a sum of padded arrays, each of which is
    materialised: ten times slower on a CPU.
    """
    width = len(kernel)
    tokens = x.shape[1] - width + 1
    shifted = [kernel[j] * x[:, j : j + tokens].astype(jnp.float32) for j in range(width)]
    return functools.reduce(jnp.add, [_seen(y, since, width - 1 - j) for j, y in enumerate(shifted)])


def _seen(x: jax.Array, since: jax.Array | None, back: int) -> jax.Array:
    """Return x where the input ``back`` tokens earlier is of the same document, and zeros elsewhere."""
    return x if since is None or back == 0 else jnp.where((since >= back)[..., None], x, 0)


def _convolve_forward(x, kernel, since):
    return convolve(x, kernel, since), (x, kernel, since)


def _convolve_backward(saved, g):
    x, kernel, since = saved
    width, tokens = len(kernel), g.shape[1]
    around = ((0, 0), (width - 1, width - 1))
    padded = jnp.pad(g, (*around, (0, 0)))
    if since is None:
        x_gradient = convolve(padded, kernel[::-1])
    else:
        sinces, parts = jnp.pad(since, around), []
        for back in range(width):
            of_outputs = np.s_[:, back : back + x.shape[1]]
            parts.append(kernel[width - 1 - back] * _seen(padded[of_outputs], sinces[of_outputs], back))
        x_gradient = functools.reduce(jnp.add, parts)
    kernel_gradient = [(x[:, j : j + tokens] * _seen(g, since, width - 1 - j)).sum((0, 1)) for j in range(width)]
    return x_gradient.astype(x.dtype), jnp.stack(kernel_gradient), None


convolve.defvjp(_convolve_forward, _convolve_backward)
