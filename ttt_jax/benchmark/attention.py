"""Build causal attention as functions for ``ttt bench tpu-schedule``.

ttt bench tpu-schedule --function ttt_jax.benchmark.attention:build --set tokens=8192 --compare path=xla path=splash
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ttt_jax.errors import ConfigError
from ttt_jax.kernels import splash
from ttt_jax.layers.blocked_attention import causal_attention

_PATHS: dict[str, Callable] = {"xla": causal_attention, "splash": splash.causal_attention}


def build(
    path: str = "xla",
    tokens: int = 2048,
    heads: int = 12,
    kv_heads: int = 0,
    head_dim: int = 64,
    batch: int = 1,
    window: int = 0,
    backward: bool = True,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function that attends, in bfloat16 and without projections, and the shapes of its arguments.

    Args:
      path: ``xla``, attention in blocks, or ``splash``, the kernel.
      kv_heads: heads of keys and values; 0: as many as ``heads``.
      window: the number of tokens that a token sees; 0: all.
      backward: whether the function also returns gradients; it then takes the gradient of the output as a further
        argument.

    Raises:
      ConfigError: for another path.
    """
    if path not in _PATHS:
        raise ConfigError(f"path={path}: expected {' or '.join(_PATHS)}")
    attend = partial(_PATHS[path], window=window or None)

    def with_gradients(q, k, v, g):
        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(g)

    q, kv = (jax.ShapeDtypeStruct((batch, tokens, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads or heads))
    return (with_gradients, (q, kv, kv, q)) if backward else (attend, (q, kv, kv))
