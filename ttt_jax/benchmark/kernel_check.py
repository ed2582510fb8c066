"""The programs that a fused kernel is checked with, for ``ttt bench tpu-schedule`` and for how long they compile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.errors import ConfigError
from ttt_jax.kernels import self_check
from ttt_jax.ttt.inner_loop import ttt_linear, ttt_mlp

PARTS = ("scan", "kernel", "inference")
_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def build(
    kind: str = "linear",
    heads: int = 12,
    head_dim: int = 64,
    mini_batch: int = 16,
    dtype: str = "bf16",
    part: str = "kernel",
    remat_group: int = 4,
    device: str = "TPU v5 lite",
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return one of the functions that :mod:`ttt_jax.kernels.self_check` compiles, and the shapes of its arguments.

    Args:
      kind, dtype: as of :func:`ttt_jax.benchmark.inner_loop.build`.
      heads: of one device; the check takes fewer where they would take long to compile.
      part: ``scan`` and ``kernel``, each with gradients, or ``inference``, the kernel without.
      remat_group: see :func:`ttt_jax.kernels.run.run`.
      device: the kind of device, as JAX names it.

    Raises:
      ConfigError: for names that are not among these.
    """
    for name, value, known in (("kind", kind, ("linear", "mlp")), ("dtype", dtype, _DTYPES), ("part", part, PARTS)):
        if value not in known:
            raise ConfigError(f"{name}={value}: expected one of {', '.join(known)}")
    loop = ttt_linear(head_dim) if kind == "linear" else ttt_mlp(head_dim)
    family = self_check.Family(loop, mini_batch, heads, _DTYPES[dtype], remat_group)
    arguments, kernel = self_check.problem_of(family, device)
    cotangents = self_check.cotangents(loop, arguments)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arguments, cotangents))
    return self_check.programs(loop, kernel, jnp.dtype(family.dtype))[part], shapes
