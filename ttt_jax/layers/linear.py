"""Map vectors linearly, by float32 parameters with named axes: projections, and the embedding of tokens.

Within ``flax.linen.logical_axis_rules`` the initial parameters come in boxes that carry the names of their axes
(``flax.linen.LogicallyPartitioned``), from which the sharding of a program for a mesh is derived. Elsewhere they are
plain arrays.

Shapes: B batch, T tokens, D width, H heads, d = D / H, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.distributed.sharding import constrain, gathered, locally, sum_over_rows

EMBEDDING_AXES = ("vocab", "embed")
HEAD_AXES = ("embed", "vocab")


def parameter(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Return a float32 parameter of ``module``; ``axes`` names its dimensions as ``ShardingRules`` does."""
    return cast(jax.Array, module.param(name, named(init, axes), shape))


def named(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """Return the initializer of a parameter with these axes."""
    return nn.with_logical_partitioning(init, axes) if nn.get_logical_axis_rules() else init


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


def to_heads(
    x: jax.Array, num_heads: int, dtype: jnp.dtype, init_stddev: float, name: str, features: int | None = None
) -> jax.Array:
    """Project x [B, T, D] to [B, T, H, d] by a submodule ``name`` of the module that calls this.

    Args:
      features: H d; D where it is None.
    """
    y = Projection(features or x.shape[-1], ("embed", "heads"), dtype, init_stddev, name=name)(x)
    return y.reshape(*x.shape[:2], num_heads, -1)


def project(
    x: jax.Array, kernel: jax.Array, axes: tuple[str, str], dtype: jnp.dtype, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """Return ``x @ kernel``, computed in ``dtype`` and returned in it or in ``out_dtype``.

    The gradient of the kernel is summed and kept in float32. The backward pass keeps x in ``dtype``.

    Args:
      axes: the names of the axes of the kernel [D_in, D_out].
    """
    return _project(x.astype(dtype), kernel, axes, dtype, out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _project(x, kernel, axes, dtype, out_dtype):
    """Multiply, with a backward pass that is written out for the order of its operands.

    Autodiff asks for (g^T x)^T, for which XLA on a CPU fuses the elementwise operations that made g into a transposed,
    strided copy. With x^T g the copy is of x, a plain array, and is shared by the projections of the same x: a SwiGLU
    layer takes 0.7 of the time.
    """
    y = jnp.matmul(x, gathered(kernel.astype(dtype), *axes), preferred_element_type=out_dtype)
    return _laid_out(y, axes[1])


def _project_forward(x, kernel, axes, dtype, out_dtype):
    return _project(x, kernel, axes, dtype, out_dtype), (x, kernel)


def _project_backward(axes, dtype, out_dtype, saved, g):
    x, kernel = saved
    x_gradient = _laid_out((g @ gathered(kernel.astype(dtype), *axes).T).astype(x.dtype), axes[0])
    kernel_gradient = jnp.einsum("btd,btf->df", x, g, preferred_element_type=jnp.float32)
    return x_gradient, constrain(kernel_gradient, *axes).astype(kernel.dtype)


_project.defvjp(_project_forward, _project_backward)


def _laid_out(activation: jax.Array, last: str) -> jax.Array:
    """Lay an activation [B, T, D] out over its batch, and over D unless it is the residual stream."""
    return constrain(activation, "batch", None, None if last == "embed" else last)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: jax.Array, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the rows of a table [V, D] in ``dtype``; the gradient of the table is summed in float32.

    Each device reads the rows of its own sequences from the whole table, and adds up their gradients by itself. Left to
    the compiler, each device adds up a few columns for the tokens of all devices, which first have to be sent to it.
    """
    whole = constrain(table.astype(dtype), None, None)
    return locally(lambda table, tokens: table[tokens], (P(), P("batch")), P("batch"))(whole, tokens)


def _lookup_forward(table, tokens, dtype):
    return lookup(table, tokens, dtype), (table, tokens)


def _lookup_backward(dtype, saved, g):
    table, tokens = saved

    def add_up(tokens, g):
        total = jnp.zeros(table.shape, jnp.float32).at[tokens].add(g.astype(jnp.float32))
        return sum_over_rows(total, None, EMBEDDING_AXES[1])

    gradient = locally(add_up, (P("batch"), P("batch")), P(None, EMBEDDING_AXES[1]))(tokens, g)
    return constrain(gradient, *EMBEDDING_AXES).astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
