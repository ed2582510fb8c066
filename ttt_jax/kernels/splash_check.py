"""Compare splash attention with attention in blocks on a small problem, on the device that is going to run it.

A compiler may compile a kernel wrongly that is right when it is interpreted (:mod:`ttt_jax.kernels.self_check`). The
small problem has the blocks, head width, shared keys and dtype of the real one, two sequences, two groups of heads, and
three blocks of tokens. Its window ends inside a block where the real one has a window. Compared are the outputs and the
gradients with respect to queries, keys and values.

Shapes: B batch, T tokens, H heads, G heads of keys and values, d head width.
"""

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttt_jax.kernels import splash
from ttt_jax.kernels.self_check import TOLERANCES, Check, Report, differences
from ttt_jax.layers.blocked_attention import causal_attention

_BATCH, _GROUPS, _BLOCKS = 2, 2, 3


class Family(NamedTuple):
    """The problems that are covered by one check.

    Attributes:
      share: the heads of queries that share a head of keys and values.
      head_dim: d.
      windowed: whether tokens see a window.
      tokens: the least T of the real problems, whose blocks the small one has.
    """

    share: int
    head_dim: int
    windowed: bool
    tokens: int = splash.FROM_TOKENS


def of_attention(family: Family) -> Check:
    """Return the check of splash attention for a family."""
    return Check(
        family,
        of_family,
        "splash attention",
        "attention in blocks",
        ("attention", "kernel"),
        "xla",
        "model.attention.kernel=xla leaves the check out",
    )


@functools.cache
def of_family(family: Family, device: jax.Device, interpret: bool = False) -> Report:
    """Check the kernel of a family on a device, once per process.

    Raises:
      Exception: any exception of the kernel where it does not compile or run.
    """
    began = time.monotonic()
    block = splash.blocks(family.tokens)[0]
    window = block + block // 2 if family.windowed else None
    kernel = functools.partial(splash.causal_attention, window=window, interpret=interpret)
    functions = [with_gradients(kernel), with_gradients(functools.partial(causal_attention, window=window))]
    inputs = problem(family, _BLOCKS * block)
    exact = tuple(x.astype(np.float32) for x in inputs)
    with ThreadPoolExecutor(2) as pool:  # nearly all of the time is compiling
        found, expected = pool.map(functools.partial(_computed, device), functions, (inputs, exact))
    return Report(differences(found, expected), TOLERANCES["bfloat16"], time.monotonic() - began)


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., dict[str, Any]]:
    """Return a function of q, k, v and a cotangent that returns the output and the gradients."""

    def function(q, k, v, cotangent):
        with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
            y, pullback = jax.vjp(attend, q, k, v)
            return {"outputs": y, "gradient of": dict(zip("qkv", pullback(cotangent), strict=True))}

    return function


def problem(family: Family, tokens: int) -> tuple[np.ndarray, ...]:
    """Draw q [B, T, H, d], k and v [B, T, G, d], and a cotangent of the output, in bfloat16, by NumPy."""
    rng = np.random.default_rng(0)
    heads = [_GROUPS * family.share, _GROUPS, _GROUPS, _GROUPS * family.share]
    drawn = (rng.standard_normal((_BATCH, tokens, n, family.head_dim), np.float32) for n in heads)
    return tuple(x.astype(jnp.bfloat16) for x in drawn)


def _computed(device: jax.Device, function: Callable, inputs: tuple[np.ndarray, ...]) -> Any:
    return jax.device_get(jax.jit(function)(*jax.device_put(inputs, device)))
