"""A linear map of the last axis with named axes. [B, T, D_in] to [B, T, D_out]."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.distributed.activations import constrain, gathered
from ttt_jax.layers.parameter import parameter


class Projection(nn.Module):
    """``x @ kernel``, no bias; ``axes`` are the logical axis names of the kernel [D_in, D_out]."""

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    init_stddev: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(self.init_stddev)
        kernel = parameter(self, "kernel", normal, (x.shape[-1], self.features), self.axes)
        return project(x, kernel, self.axes, self.dtype)


def to_heads(x: jax.Array, num_heads: int, dtype: jnp.dtype, init_stddev: float, name: str) -> jax.Array:
    """[B, T, D] to [B, T, H, d] by a projection of this name, of the module that calls."""
    y = Projection(x.shape[-1], ("embed", "heads"), dtype, init_stddev, name=name)(x)
    return y.reshape(*x.shape[:2], num_heads, -1)


def project(
    x: jax.Array, kernel: jax.Array, axes: tuple[str, str], dtype: jnp.dtype, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """``x @ kernel`` computed in ``dtype`` and returned in it, or in ``out_dtype``; ``axes`` are those of the kernel.
    The gradient of the kernel is summed and kept in float32. The backward pass keeps x in ``dtype``."""
    return _project(x.astype(dtype), kernel, axes, dtype, out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(x, kernel, axes, dtype, out_dtype):
    """The backward pass is written out for its operand order. Autodiff asks for (g^T x)^T, which XLA on a CPU serves by
    fusing the elementwise operations that made g into a transposed, strided copy. With x^T g the copy is of x, a
    plain array, and is shared by the projections of the same x: a SwiGLU layer takes 0.7 of the time.
    """
    y = jnp.matmul(x, gathered(kernel.astype(dtype), *axes), preferred_element_type=out_dtype)
    return _laid_out(y, axes[1])


def _forward(x, kernel, axes, dtype, out_dtype):
    return _project(x, kernel, axes, dtype, out_dtype), (x, kernel)


def _backward(axes, dtype, out_dtype, saved, g):
    x, kernel = saved
    x_gradient = _laid_out((g @ gathered(kernel.astype(dtype), *axes).T).astype(x.dtype), axes[0])
    kernel_gradient = jnp.einsum("btd,btf->df", x, g, preferred_element_type=jnp.float32)
    return x_gradient, constrain(kernel_gradient, *axes).astype(kernel.dtype)


_project.defvjp(_forward, _backward)


def _laid_out(activation: jax.Array, last: str) -> jax.Array:
    """[B, T, D] over its batch, and over D where that is split between devices; the residual stream is not."""
    return constrain(activation, "batch", None, None if last == "embed" else last)
